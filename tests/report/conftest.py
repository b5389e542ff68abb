"""A browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Browser, find_chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a headless Chromium; the test is skipped where there is none."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine")
    with Browser(program, tmp_path_factory.mktemp("chromium")) as started:
        yield started
