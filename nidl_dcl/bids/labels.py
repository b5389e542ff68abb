"""Labels of participants and sessions as they are asked for, and what to say of unknown ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from nidl_dcl.bids.entities import natural_key

_DASHES = "[\u2010-\u2015\u2212]"
"""Hyphens, dashes and minus signs that a word processor puts in place of "-"."""


def with_prefix(given: str | Sequence[str] | None, prefix: str) -> set[str] | None:
    """Return labels with their prefix; None if there are none."""
    if not given:
        return None
    labels = [given] if isinstance(given, str) else given
    return {prefix + str(label).removeprefix(prefix) for label in labels}


def unknown_labels(what: str, unknown: Collection[str], known: Iterable[str], root: Path) -> str:
    """Return that labels are unknown, what there is, and what may have been meant.

    Parameters
    ----------
    what : {"participant", "session"}
        What they are labels of.
    unknown : collection of str
        Labels, as with `with_prefix`.
    known : iterable of str
        Those of the dataset.
    root : Path
        The dataset.
    """
    names, there = sorted(unknown, key=natural_key), sorted(known, key=natural_key)
    close = difflib.get_close_matches(names[0], there, n=3) or there[:3]
    exists = f"{len(there)}, for instance {', '.join(close)}" if there else "none"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (
        f"Unknown {what}{'s' if len(names) > 1 else ''} {', '.join(names[:10])}{more} in {root}. "
        f"There are {exists}.{_hint(what, names, set(there))}"
    )


def _hint(what: str, unknown: Sequence[str], known: set[str]) -> str:
    """Return what may have been meant by labels that are none."""
    prefix = {"participant": "sub-", "session": "ses-"}[what]
    for name in unknown:
        label = name.removeprefix(prefix)
        plain = re.sub(_DASHES, "-", label)
        if "," in label or ";" in label or len(label.split()) > 1:
            single = " ".join(re.sub("[,;]", " ", plain).split())
            return f" Labels are separated by blanks, each a word of its own: {single}."
        if plain != label and prefix + plain.removeprefix(prefix) in known:
            return f" The dash in {label} is no hyphen (-): {plain}."
        if re.fullmatch("[0-9]+(-|:|[.]{2,3})[0-9]+", plain):
            return " Ranges are not known: name each label."
        if _is_file(label):
            return (
                f" {label} is a file, and labels are words: $(cat {label}), if it holds nothing but "
                "labels; --exclude takes a file of those who are not to be used."
            )
    return ""


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # such as a name that is too long
        return False
