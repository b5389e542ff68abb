"""Names that stand for ids, hashed with a secret key, and the file that holds the key.

Without the key nobody can try ids until one fits. Which files need pseudonyms is for `sharing`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import uuid
from pathlib import Path

from nidl_dcl.errors import UsageError

_SHORTEST, _LONGEST = 32, 4096
"""Bytes of a key file."""

_TOKEN = re.compile(r"(?<![A-Za-z0-9])(sub|ses)-[A-Za-z0-9+]+")


class Pseudonyms:
    """What stands for participants, sessions and images; the same key gives the same names.

    The key is secret: whoever has it can find the pseudonym of an id by trying.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @property
    def fingerprint(self) -> str:
        """What differs from key to key and reveals nothing of the key."""
        return self._hash("fingerprint", "")

    @property
    def dataset(self) -> str:
        """URI that stands for the dataset and leads nowhere."""
        return uuid.UUID(self._hash("dataset", "", 32)).urn

    def participant(self, text: str) -> str:
        """Return what stands for a participant: ``sub-`` and 16 hexadecimal digits."""
        return f"sub-{self._hash('participant', text)}"

    def session(self, text: str) -> str:
        """Return what stands for a session, the same for all participants."""
        return f"ses-{self._hash('session', text)}"

    def run(self, text: str) -> str:
        """Return a run as it is; a number above 99, which may be a date, becomes another."""
        if text.isascii() and text.isdigit() and int(text) < 100:
            return text
        return str(10**9 + int(self._hash("run", text, 7), 16))

    def image(self, path: str, participant: str) -> str:
        """Return what stands for the path of an image in the dataset, or for a BIDS URI of it.

        `participant` is a pseudonym, or ``n/a``; a URI has the pseudonym of its path.
        """
        home, _, inside = path.removeprefix("bids:").partition(":")
        if path.startswith("bids:"):
            path = inside if home == "raw" else f"derivatives/{home}/{inside}"
            return f"bids:raw:{self.image(path, participant)}"
        name = self._hash("image", path)
        return name if participant == "n/a" else f"{participant}/{name}"

    def text(self, text: str) -> str:
        """Return text in which ids of participants and sessions are replaced."""
        return _TOKEN.sub(
            lambda found: (
                self.participant(found[0]) if found[1] == "sub" else self.session(found[0])
            ),
            text,
        )

    def checksum(self, text: str) -> str:
        """Return a checksum of a checksum, so that nobody can try what it was made from."""
        return self._hash("checksum", text)

    def _hash(self, kind: str, text: str, length: int = 16) -> str:
        message = f"{kind}\x1f{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:length]


def default_key() -> Path:
    """Return where the key is kept: in the folder of the user's configuration.

    Raises
    ------
    UsageError
        When the user has no home.
    """
    given = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        config = Path(given) if given.startswith("/") else Path.home() / ".config"
    except RuntimeError as error:
        raise UsageError("There is no home folder for the key: give --key-file FILE.") from error
    return config / "nidl_dcl" / "share.key"


def read_key(file: Path, *, make: bool) -> bytes:
    """Return the key in a file; make the file, for its owner alone, if it is missing and may be made.

    Raises
    ------
    UsageError
        When it is missing, is no key, or anyone may read it.
    """
    try:
        if make and not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(32) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        if not file.is_file():  # a pipe would block
            raise UsageError(
                f"The key {file} is missing. Put it back, or give the one that was used by --key-file "
                "FILE; with another key, choose another SHARED_DIR."
            )
        if file.stat().st_mode & 0o007:
            raise UsageError(f"Anyone may read the key {file}. Run: chmod 600 {file}")
        with file.open("rb") as stream:
            key = stream.read(_LONGEST + 1).strip()
    except OSError as error:
        raise UsageError(
            f"The key {file} cannot be used: {error.strerror or error}. Give another file by "
            "--key-file FILE."
        ) from error
    if not _SHORTEST <= len(key) <= _LONGEST:
        raise UsageError(
            f"{file} is no key: it has {len(key)} bytes, {_SHORTEST} to {_LONGEST} random ones are "
            "needed. Name a file that is not there, and it is made."
        )
    return key
