"""What can change between two nights: items put in or replaced, with their record and vector, and items withdrawn."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from index.hits import Vectors
from index.wal import MAX_PAYLOAD, LogDamaged, LogReader

MAX_ID_BYTES, MAX_RECORD_BYTES = 1_024, 1 << 20
NORM_TOLERANCE = 1e-3
"""As the gate of the next night has it: a vector that is let in today must not stop the night, nor outshine every other."""
_COUNTS = struct.Struct("<III")


class ChangeRefused(BrewlineError):
    """A batch of changes cannot be taken; none of it was."""


@dataclass(frozen=True, eq=False)
class Changes:
    """One batch, taken whole or not at all: `ids`, their opaque `records` and unit `vectors` float32 [n, D]; `withdrawn` ids."""

    ids: Sequence[str]
    records: Sequence[bytes]
    vectors: Vectors
    withdrawn: Sequence[str] = ()

    def to_bytes(self) -> bytes:
        """The batch as it is logged is returned; `parse` reads it back."""
        ids = [one.encode() for one in (*self.ids, *self.withdrawn)]
        lengths = np.array([len(one) for one in (*ids, *self.records)], "<u4")
        counts = _COUNTS.pack(len(self.ids), len(self.withdrawn), self.vectors.shape[1])
        return b"".join((counts, lengths.tobytes(), *ids, *self.records, self.vectors.astype("<f4").tobytes()))

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """The batch that `to_bytes` wrote is returned. Raises LogDamaged for bytes that are no batch."""
        try:
            put, gone, dims = _COUNTS.unpack_from(payload)
            lengths = np.frombuffer(payload, "<u4", 2 * put + gone, _COUNTS.size)
            ends = np.cumsum(lengths, dtype=np.int64) + _COUNTS.size + lengths.nbytes
            parts = [payload[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist())]
            start = int(ends[-1]) if len(ends) else _COUNTS.size
            vectors = np.frombuffer(payload, "<f4", offset=start).reshape(put, dims).astype(np.float32)
            ids = [str(one, "utf-8") for one in parts[: put + gone]]
        except (ValueError, struct.error) as error:
            raise LogDamaged(
                f"a logged batch of {len(payload)} bytes is none ({error}): was it written by another program?"
            ) from None
        return cls(ids[:put], parts[put + gone :], vectors, ids[put:])


def check_changes(
    ids: Sequence[str], records: Sequence[bytes], vectors: npt.NDArray[Any], withdrawn: Sequence[str], dims: int
) -> Changes:
    """The batch is returned, fit to be logged. Raises ChangeRefused, which says what is wrong with which id."""
    if not ids and not withdrawn:
        raise ChangeRefused("a batch without changes: expected at least one item to put in or withdraw")
    if vectors.shape != (len(ids), dims) or vectors.dtype.kind != "f" or len(records) != len(ids):
        raise ChangeRefused(
            f"{len(ids)} ids, {len(records)} records and vectors {vectors.dtype}{list(vectors.shape)}: expected one record and "
            f"one vector of {dims} floats for each id"
        )
    _check_ids([*ids, *withdrawn])
    for one, record in zip(ids, records):
        if not isinstance(record, bytes) or len(record) > MAX_RECORD_BYTES:
            size = f"{len(record):,} bytes" if isinstance(record, bytes) else type(record).__name__
            raise ChangeRefused(
                f"the record of {one[:80]!r} is {size}, expected at most {MAX_RECORD_BYTES:,} bytes: shorten its text"
            )
    with np.errstate(over="ignore"):
        taken: Vectors = np.ascontiguousarray(vectors, np.float32)
        away = np.abs(np.linalg.norm(taken.astype(np.float64), axis=1) - 1)
    bad = np.flatnonzero(~(away <= NORM_TOLERANCE))
    if bad.size:
        raise ChangeRefused(
            f"the vector of {ids[bad[0]][:80]!r} is no unit vector (its norm is off by {away[bad[0]]:.3g}; {bad.size} of "
            f"{len(ids)} are): encode it again"
        )
    changes = Changes(list(ids), list(records), taken, list(withdrawn))
    total = sum(map(len, records)) + taken.nbytes + sum(len(one.encode()) + 8 for one in (*ids, *withdrawn))
    if total > MAX_PAYLOAD:
        raise ChangeRefused(f"a batch of about {total:,} bytes, expected at most {MAX_PAYLOAD:,}: send it in parts")
    return changes


def _check_ids(ids: Sequence[str]) -> None:
    for one in ids:
        if not isinstance(one, str) or any("\ud800" <= letter <= "\udfff" for letter in one):
            raise ChangeRefused(f"id {one!r:.80} is not UTF-8 text: clean it where it enters")
        if not 0 < len(one.encode()) <= MAX_ID_BYTES:
            raise ChangeRefused(f"id {one[:80]!r} has {len(one.encode()):,} bytes, expected 1 to {MAX_ID_BYTES:,}")
    if len(set(ids)) != len(ids):
        twice = next(one for place, one in enumerate(ids) if one in ids[:place])
        raise ChangeRefused(f"id {twice[:80]!r} stands twice in one batch: which change is meant? Send one each")


class Upsert(NamedTuple):
    """An item as it was last put in: its record, its vector float32 [D], and the encoder that made the vector."""

    record: bytes
    vector: Vectors
    fingerprint: str


@dataclass
class Folded:
    """What the log says up to `position`: the last change of each id wins. `upserts` in the order in which they last came."""

    position: int = 0
    upserts: dict[str, Upsert] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)

    def take(self, changes: Changes, fingerprint: str) -> None:
        """The changes are the last ones."""
        for one in (*changes.ids, *changes.withdrawn):
            self.upserts.pop(one, None)
        self.withdrawn.update(changes.withdrawn)
        self.withdrawn.difference_update(changes.ids)
        for one, record, vector in zip(changes.ids, changes.records, changes.vectors):
            self.upserts[one] = Upsert(record, vector, fingerprint)

    def to_bytes(self) -> bytes:
        """The same state as bytes is returned, for a part of a snapshot; `parse` reads it back."""
        groups: dict[tuple[str, int], list[str]] = {}
        for one, put in self.upserts.items():
            groups.setdefault((put.fingerprint, len(put.vector)), []).append(one)
        batches = [("", Changes([], [], np.zeros((0, 1), np.float32), sorted(self.withdrawn)))]
        for (fingerprint, _), ids in groups.items():
            puts = [self.upserts[one] for one in ids]
            batches.append((fingerprint, Changes(ids, [put.record for put in puts], np.stack([put.vector for put in puts]))))
        payloads = [(fingerprint, changes.to_bytes()) for fingerprint, changes in batches]
        facts = {"position": self.position, "batches": [[fingerprint, len(payload)] for fingerprint, payload in payloads]}
        return b"\n".join((json.dumps(facts).encode(), b"".join(payload for _, payload in payloads)))

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """The state that `to_bytes` wrote is returned."""
        head, _, rest = content.partition(b"\n")
        facts, folded, start = json.loads(head), cls(), 0
        for fingerprint, size in facts["batches"]:
            folded.take(Changes.parse(rest[start : start + size]), fingerprint)
            start += size
        folded.position = facts["position"]
        return folded


def fold(folder: Path, after: int, upto: int | None = None, carried: Folded | None = None) -> Folded:
    """What the log in a folder says of the changes after one position up to another (None: the last written) is returned.

    `carried` is what earlier nights folded and still counts; it is not changed. The log stays as it is, and may be written
    meanwhile. Raises LogDamaged, LogTrimmed.
    """
    before = carried or Folded()
    folded = Folded(after, dict(before.upserts), set(before.withdrawn))
    with closing(LogReader(folder, after)) as reader:
        for entry in reader.read():
            if upto is not None and entry.position > upto:
                break
            folded.take(Changes.parse(entry.payload), str(entry.facts["fingerprint"]))
            folded.position = entry.position
    return folded
