from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nidl_dcl import load_model
from nidl_dcl.errors import UsageError
from nidl_dcl.models.model_source import BUILTIN, folder_of
from nidl_dcl.models.serialization import read_description, weights_sha256


def test_the_word_is_the_model_of_the_package_and_all_else_is_a_path() -> None:
    shipped = folder_of("builtin")
    assert shipped.is_absolute()
    assert (shipped / "model.json").is_file()
    for path in ("./builtin", "models/builtin", "builtin/", Path("builtin"), "Builtin", ""):
        assert folder_of(path) == Path(path)


def test_a_folder_of_that_name_does_not_win_over_the_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(folder_of(BUILTIN), tmp_path / "builtin")
    (own / "model.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert read_description("builtin")["fitted"] is True
    assert len(weights_sha256("builtin")) == 64
    assert load_model("builtin").fitted
    for path in ("./builtin", Path("builtin"), own):
        with pytest.raises(UsageError, match="is not the description of a model"):
            load_model(path)
