"""Where a model is: in a folder of the user's, or in the package, which ships the model ``builtin``.

`serialization` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

ModelSource = Literal["builtin"] | Path
"""What names a model; the text alone means the one that the package ships."""

BUILTIN: Final = "builtin"


def folder_of(source: str | Path) -> Path:
    """Return the folder of a model: that of the package for the text ``builtin``.

    The text wins over a folder of that name, so that it means the same wherever it is used. Such a
    folder is meant by ``./builtin``, in Python also by a `Path`.
    """
    return Path(__file__).parent / BUILTIN if source == BUILTIN else Path(source)
