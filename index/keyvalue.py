"""The contract of the key-value store: opaque bytes under (kind, id, fingerprint), and the errors of keeping them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from index.errors import BrewlineError

Key = tuple[str, str, str]
"""Kind, id, fingerprint."""


class StoreError(BrewlineError):
    """The key-value store refuses what was asked."""


class StoreUnavailable(StoreError):
    """The key-value store cannot be reached now; asking again later may succeed."""


class KeyValueStore(Protocol):
    """Keeps bytes and knows no meaning. Kinds, ids and fingerprints are any UTF-8 text, however hostile.

    A value under one fingerprint is invisible under another: an old encoder's vector can never answer for a new one's. Any
    method may be called from any thread, and raises StoreUnavailable or StoreError.
    """

    def get_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> list[bytes | None]:
        """The value of each id is returned in the order asked, None where there is none or it has expired."""

    def get_each(self, keys: Sequence[Key]) -> list[bytes | None]:
        """The value of each key is returned. The keys are read in their order, in one round trip if that can be."""

    def put_many(self, kind: str, values: Mapping[str, bytes], fingerprint: str = "", ttl_s: float | None = None) -> None:
        """Every value is kept, for `ttl_s` seconds if given (at least 0.001), else until replaced or deleted.

        Each value is replaced whole; after an error some may be kept and others not: put them again.
        """

    def swap(self, kind: str, one: str, old: bytes | None, new: bytes, fingerprint: str = "", ttl_s: float | None = None) -> bool:
        """The value of one id is `new` if it was `old` (None: there was none), in one step for everybody; returns whether it was.

        What is read, changed and swapped until that succeeds is an atomic update, whoever else does the same.
        """

    def delete_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> None:
        """None of the ids has a value any more; ids without one are no error."""

    def ids(self, kind: str, fingerprint: str = "") -> Iterator[str]:
        """Every id with a value is yielded once, in no particular order; ids put or deleted meanwhile may be missed."""

    def ping(self) -> None:
        """The store answered. Raises StoreUnavailable if it did not."""

    def close(self) -> None:
        """The store's connections are closed; closing twice is harmless."""


def encode_key(text: str, what: str) -> bytes:
    """The text's UTF-8 bytes are returned. Raises StoreError for a lone surrogate, which no store could give back."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise StoreError(f"{what} {text[:80]!r} is not UTF-8 text: clean it where it enters") from None


def check_ttl(ttl_s: float | None) -> None:
    """The time to live is usable. Raises StoreError for NaN or less than a millisecond."""
    if ttl_s is not None and not 0.001 <= ttl_s <= 1e10:
        raise StoreError(f"ttl_s is {ttl_s}, expected 0.001 to 1e10 seconds, or None to keep the value")
