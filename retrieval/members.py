"""Members in the key-value store: records, and last night's vectors, each checked before it is believed.

A record is kept by member id; the words of its history are the catalogue's, so they are of the same day as the vectors. A
vector is kept under the encoder's fingerprint, behind the digest of the record and the digest of the view it was made from: one
whose record has changed since is not returned, and the night re-encodes only what reads differently. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from index.keyvalue import KeyValueStore
from retrieval.records import DIGEST_BYTES, MemberRecord, MemberRecordError, decode_record, encode_record

RECORD, VECTOR = "member", "member-vector"
MAGIC = b"BLV1"

Vector = npt.NDArray[np.float32]


class UnknownMember(BrewlineError):
    """An id that the member store does not hold."""


@dataclass(frozen=True)
class KnownMember:
    """A record with last night's vector, or None if there is none or the record has changed since it was made."""

    record: MemberRecord
    vector: Vector | None


class MemberStore:
    """Records and vectors of members over any key-value store. `fingerprint` is the encoder's; it keys the vectors."""

    def __init__(self, store: KeyValueStore, fingerprint: str) -> None:
        self._store = store
        self.fingerprint = fingerprint

    def put(self, records: Sequence[MemberRecord]) -> None:
        """The records are in the store; a vector made from an older record of the same member is no longer returned."""
        self._store.put_many(RECORD, {record.member.member_id: encode_record(record) for record in records})

    def put_vectors(self, records: Sequence[MemberRecord], views: Sequence[bytes], vectors: Vector) -> None:
        """The vectors float32 [M,D] are in the store, each bound to its record and to the digest of its view."""
        values = {
            record.member.member_id: MAGIC + _digest(encode_record(record)) + view + vector.astype("<f4").tobytes()
            for record, view, vector in zip(records, views, vectors, strict=True)
        }
        self._store.put_many(VECTOR, values, self.fingerprint)

    def get(self, member_id: str) -> KnownMember:
        """What is known of a member. Raises UnknownMember, MemberRecordError."""
        stored = self._store.get_many(RECORD, [member_id])[0]
        if stored is None:
            raise UnknownMember(
                f"member {member_id[:80]!r} is not in the member store; check the id, run `brewline nightly` with --members, "
                "or describe the member in the request"
            )
        value = self._store.get_many(VECTOR, [member_id], self.fingerprint)[0]
        kept = None if value is None else _Kept.read(value, member_id)
        right = kept is not None and kept.record == _digest(stored)
        return KnownMember(decode_record(stored, member_id), kept.vector if kept is not None and right else None)

    def vectors(self, records: Sequence[MemberRecord], views: Sequence[bytes]) -> list[Vector | None]:
        """float32 [D] for each record that was last encoded from a view of the same digest, else None."""
        ids = [record.member.member_id for record in records]
        values = self._store.get_many(VECTOR, ids, self.fingerprint)
        found: list[Vector | None] = []
        for who, view, value in zip(ids, views, values, strict=True):
            kept = None if value is None else _Kept.read(value, who)
            found.append(kept.vector if kept is not None and kept.view == view else None)
        return found


@dataclass(frozen=True)
class _Kept:
    record: bytes
    view: bytes
    vector: Vector

    @classmethod
    def read(cls, value: bytes, member_id: str) -> _Kept:
        head = len(MAGIC) + 2 * DIGEST_BYTES
        if not value.startswith(MAGIC) or len(value) < head or (len(value) - head) % 4:
            raise MemberRecordError(
                f"the vector of member {member_id[:80]!r} cannot be read ({len(value)} bytes); "
                "run `brewline nightly` with --members again"
            )
        middle = len(MAGIC) + DIGEST_BYTES
        return cls(value[len(MAGIC) : middle], value[middle:head], np.frombuffer(value[head:], "<f4").astype(np.float32))


def _digest(stored: bytes) -> bytes:
    return hashlib.blake2b(stored, digest_size=DIGEST_BYTES).digest()
