"""One short string for everything that decides a model's answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from index.errors import BrewlineError

LENGTH = 20


class MissingPart(BrewlineError):
    """A model folder lacks a file that it needs to be complete."""


class FingerprintMismatch(BrewlineError):
    """Two artifacts that must belong together do not."""

    def __init__(self, what: str, seen: str, expected: str, remedy: str) -> None:
        super().__init__(f"{what}: fingerprint {seen}, expected {expected}; {remedy}")
        self.seen, self.expected = seen, expected


def folder_fingerprint(folder: Path, files: Iterable[str]) -> str:
    """The first 20 hex digits of a sha256 over the names and contents of the named files, in the given order."""
    whole = hashlib.sha256()
    for name in files:
        path = folder / name
        if not path.is_file():
            raise MissingPart(f"{folder}: {name} is missing; expected a complete model folder as `train` writes it")
        with path.open("rb") as file:
            whole.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:LENGTH]
