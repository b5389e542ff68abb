"""Salted hashes: membership of a list can be asked, its names cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def salted(texts: Iterable[str], salt: str) -> list[str]:
    """Return a hash for each distinct text, sorted: membership can be asked, a name not read."""
    return sorted({salted_hash(text, salt) for text in texts})


def salted_hash(text: str, salt: str) -> str:
    """Return a hash of `text` that nobody can compare with one of another salt."""
    return hashlib.blake2b(text.encode(), key=salt.encode()[:64], digest_size=12).hexdigest()
