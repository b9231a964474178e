"""The ids of a snapshot: text by row and row by text, both straight from mapped files.

The texts lie end to end in one UTF-8 blob; the way back from a text to its row is a sorted table of 64-bit hashes. Nothing is
held per id in Python, so a hundred million ids open as fast as ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from index.manifest import SnapshotError

Rows = npt.NDArray[np.int64]
_TOGETHER = 65_536
"""Ids that are looked up at a time."""
_BYTES = 1 << 21
"""Bytes of ids that are compared at a time; each takes 26 bytes of memory meanwhile."""
_FEW = 32
"""Fewer are compared one by one."""


@dataclass(frozen=True, slots=True)
class IdArrays:
    """What is stored for N ids: blob uint8[bytes], offsets int64[N+1], hashes uint64[N] ascending, order int64[N]."""

    blob: npt.NDArray[np.uint8]
    offsets: Rows
    hashes: npt.NDArray[np.uint64]
    order: Rows


def hash_ids(encoded: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """One 64-bit BLAKE2b hash per id is returned, the same on every machine and in every run."""
    return np.frombuffer(b"".join(blake2b(one, digest_size=8).digest() for one in encoded), dtype="<u8")


def encode_ids(ids: Sequence[str]) -> IdArrays:
    """The arrays that stand for these ids are returned, row by row.

    Raises SnapshotError for an id that is not text or that UTF-8 cannot write (a lone surrogate).
    """
    try:
        encoded = [one.encode("utf-8") for one in ids]
    except (UnicodeEncodeError, AttributeError):
        row, bad = next((row, one) for row, one in enumerate(ids) if not _is_text(one))
        raise SnapshotError(f"id {bad!r} of row {row} is not UTF-8 text: clean the id or leave the row out") from None
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(one) for one in encoded], out=offsets[1:])
    hashes = hash_ids(encoded)
    order = np.argsort(hashes, kind="stable").astype(np.int64)
    return IdArrays(np.frombuffer(b"".join(encoded), np.uint8), offsets, hashes[order], order)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


class Ids:
    """N ids, addressed by row; `rows` finds the rows of given ids."""

    def __init__(self, arrays: IdArrays) -> None:
        self._arrays = arrays
        self._blob = memoryview(arrays.blob)  # type: ignore[arg-type]  # numpy states its buffer from Python 3.12 on

    @classmethod
    def of(cls, ids: Sequence[str]) -> Ids:
        """The same object as from a snapshot is returned, held in memory."""
        return cls(encode_ids(ids))

    def __len__(self) -> int:
        return len(self._arrays.order)

    def __getitem__(self, row: int) -> str:
        return self.many([row])[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 65_536):
            yield from self.many(np.arange(start, min(start + 65_536, len(self))))

    def __contains__(self, item_id: str) -> bool:
        return bool(self.rows([item_id])[0] >= 0)

    def many(self, rows: Rows | Sequence[int]) -> list[str]:
        """The ids of these rows are returned in their order.

        Raises IndexError for a row outside [0, N): a negative row is padding in `Hits`, never the end of the list.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size == 0:
            return []
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} asked, the snapshot has rows 0..{len(self) - 1}")
        starts, ends = self._arrays.offsets[wanted].tolist(), self._arrays.offsets[wanted + 1].tolist()
        return [str(self._blob[start:end], "utf-8") for start, end in zip(starts, ends)]

    def rows(self, ids: Sequence[str]) -> Rows:
        """The row of each id is returned, int64[len(ids)]; -1 for an id that is not here, the lowest row of a duplicate."""
        encoded = [one.encode("utf-8", "surrogatepass") for one in ids]
        found = [self._rows(encoded[start : start + _TOGETHER]) for start in range(0, len(encoded), _TOGETHER)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _rows(self, encoded: list[bytes]) -> Rows:
        held, order, hashes = self._arrays.hashes, self._arrays.order, hash_ids(encoded)
        first = np.searchsorted(held, hashes, side="left")
        rows = np.full(len(encoded), -1, np.int64)
        met = np.flatnonzero(first < len(held))
        met = met[held[first[met]] == hashes[met]]
        rows[met] = order[first[met]]
        doubtful = met if len(met) < _FEW else met[~self._are(rows[met], [encoded[place] for place in met.tolist()])]
        for place in doubtful.tolist():
            last = int(np.searchsorted(held, hashes[place], side="right"))
            rows[place] = self._find(encoded[place], int(first[place]), last)
        return rows

    def _are(self, rows: Rows, encoded: list[bytes]) -> npt.NDArray[np.bool_]:
        """bool [n]: whether the ids of these rows are these texts, byte by byte."""
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        if len(encoded) > 1 and lengths.sum() > _BYTES:
            half = len(encoded) // 2
            return np.concatenate([self._are(rows[:half], encoded[:half]), self._are(rows[half:], encoded[half:])])
        starts = self._arrays.offsets[rows]
        same: npt.NDArray[np.bool_] = self._arrays.offsets[rows + 1] - starts == lengths
        asked = np.frombuffer(b"".join(encoded), np.uint8)[np.repeat(same, lengths)]
        lengths = lengths[same]
        whose = np.repeat(np.arange(len(lengths)), lengths)
        at = np.arange(len(whose)) + np.repeat(starts[same] - (np.cumsum(lengths) - lengths), lengths)
        same[np.flatnonzero(same)[whose[self._arrays.blob[at] != asked]]] = False
        return same

    def _find(self, wanted: bytes, first: int, last: int) -> int:
        """Equal hashes only nominate: the bytes decide, so a collision costs time and never a wrong row."""
        for row in self._arrays.order[first:last].tolist():
            if self._bytes(row) == wanted:
                return int(row)
        return -1

    def _bytes(self, row: int) -> bytes:
        start, end = self._arrays.offsets[row : row + 2].tolist()
        return bytes(self._blob[start:end])

    def duplicates(self) -> list[str]:
        """Each id that stands in more than one row is returned once, sorted."""
        hashes = self._arrays.hashes
        starts = np.flatnonzero(hashes[1:] == hashes[:-1])
        suspects = np.unique(np.concatenate([self._arrays.order[starts], self._arrays.order[starts + 1]]))
        seen: set[bytes] = set()
        twice: set[bytes] = set()
        for row in suspects.tolist():
            one = self._bytes(row)
            (twice if one in seen else seen).add(one)
        return sorted(one.decode("utf-8") for one in twice)
