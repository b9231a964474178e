"""Members in the key-value store: records, and last night's vectors, each checked before it is believed.

A record is kept by member id; the words of its history are the catalogue's, so they are of the same day as the vectors. A
vector is kept under the encoder's fingerprint, behind the digest of the record and the digest of the view it was made from: one
whose record has changed since is not returned, and the night re-encodes only what reads differently. What the service is told
during the day (`retrieval.recent`) belongs to the record from that moment on, and so outdates the vector. Each night renews its
encoder's vectors; one that no night renewed for `VECTOR_DAYS` leaves the store, as an old encoder's all do. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from index.keyvalue import KeyValueStore
from index.steady_store import SteadyStore
from retrieval.data.schema import DAY, Connection, Member
from retrieval.recent import RECENT, Told, append, decode_told, stranger, with_told
from retrieval.records import DIGEST_BYTES, MemberRecord, MemberRecordError, StoredRecord, decode_record, encode_record

RECORD, VECTOR = "member", "member-vector"
MAGIC = b"BLV1"
AS_OF = b',"as_of":'
VECTOR_DAYS = 30
"""Days that a vector stays after the last night that wrote it: time to roll back to the encoder before. Without a vector the
member is encoded on request."""

Vector = npt.NDArray[np.float32]

log = logging.getLogger(__name__)


class UnknownMember(BrewlineError):
    """An id that the member store does not hold."""


class KnownMember:
    """A record, with what was told since the night, and its vector, or None if there is none or the record has changed since.

    With a right vector the record is the one that it was made from, byte by byte, and is made of them when it is asked for:
    whom a vector describes is known without the words of the history.
    """

    __slots__ = ("_kept", "vector")

    def __init__(self, record: MemberRecord | StoredRecord, vector: Vector | None) -> None:
        self._kept, self.vector = record, vector

    @property
    def record(self) -> MemberRecord:
        """The whole record."""
        if isinstance(self._kept, StoredRecord):
            self._kept = self._kept.whole()
        return self._kept

    @property
    def member(self) -> Member:
        """The record's member."""
        return self._kept.member

    @property
    def connections(self) -> tuple[Connection, ...]:
        """The record's connections."""
        return self._kept.connections

    @property
    def seen(self) -> list[str]:
        """The record's ids: none of them is to be recommended."""
        return self._kept.seen


class MemberStore:
    """Records and vectors of members over any key-value store. `fingerprint` is the encoder's; it keys the vectors."""

    def __init__(self, store: KeyValueStore, fingerprint: str) -> None:
        self._store = store
        self.fingerprint = fingerprint

    def put(self, records: Sequence[MemberRecord]) -> None:
        """The records are in the store; a vector made from an older record of the same member is no longer returned."""
        self._store.put_many(RECORD, {record.member.member_id: encode_record(record) for record in records})

    def put_vectors(self, records: Sequence[MemberRecord], views: Sequence[bytes], vectors: Vector) -> None:
        """The vectors float32 [M,D] are in the store for `VECTOR_DAYS`, each bound to its record and to its view's digest."""
        values = {
            record.member.member_id: MAGIC + _digest(encode_record(record)) + view + vector.astype("<f4").tobytes()
            for record, view, vector in zip(records, views, vectors, strict=True)
        }
        self._store.put_many(VECTOR, values, self.fingerprint, ttl_s=VECTOR_DAYS * DAY)

    def get(self, member_id: str) -> KnownMember:
        """What is known of a member. Raises UnknownMember, MemberRecordError."""
        # What was told comes first: what a night takes over in between is then in both.
        keys = [(RECENT, member_id, ""), (RECORD, member_id, ""), (VECTOR, member_id, self.fingerprint)]
        recent, stored, value = self._store.get_each(keys)
        told = decode_told(recent, member_id)
        if stored is None and not told:
            raise UnknownMember(
                f"member {member_id[:80]!r} is not in the member store; check the id, run `brewline nightly` over data that "
                "holds the member, or describe the member in the request"
            )
        return self._known(member_id, stored, told, value)

    def last_known(self, member_id: str) -> KnownMember | None:
        """What this process last read or wrote of a member, None if that is nothing. Asks no store. Raises MemberRecordError."""
        if not isinstance(self._store, SteadyStore):
            return None
        told = decode_told(self._store.remembered(RECENT, member_id), member_id)
        stored = self._store.remembered(RECORD, member_id)
        if stored is None and not told:
            return None
        return self._known(member_id, stored, told, self._store.remembered(VECTOR, member_id, self.fingerprint))

    def _known(self, member_id: str, stored: bytes | None, told: Sequence[Told], value: bytes | None) -> KnownMember:
        kept = None if value is None else _Kept.read(value, member_id)
        if stored is None or told:
            before = stranger(member_id) if stored is None else decode_record(stored, member_id)
            record = with_told(before, told)
            as_stored = encode_record(record) if stored is None or record is not before else stored
            return KnownMember(record, kept.vector if kept is not None and kept.record == _digest(as_stored) else None)
        opened = StoredRecord(stored, member_id)
        if kept is not None and kept.record == _digest(stored):
            return KnownMember(opened, kept.vector)
        return KnownMember(opened.whole(), None)

    def tell(self, member_id: str, told: Sequence[Told]) -> int:
        """The engagements are part of the member's record, in time order, each event id once; returns how many were new.

        A member whom no night knows begins here. Safe against every other writer of the same member. Raises MemberRecordError,
        StoreUnavailable.
        """
        (stored,) = self._store.get_many(RECORD, [member_id])
        before = stranger(member_id) if stored is None else decode_record(stored, member_id)
        return append(self._store, before, told, int(time.time()))

    def vectors(self, records: Sequence[MemberRecord], views: Sequence[bytes]) -> list[Vector | None]:
        """float32 [D] for each record that was last encoded from a view of the same digest, else None.

        A damaged value counts as none, with a warning: whoever asks encodes what is missing, and so mends it.
        """
        ids = [record.member.member_id for record in records]
        values = self._store.get_many(VECTOR, ids, self.fingerprint)
        found: list[Vector | None] = []
        damaged: list[MemberRecordError] = []
        for who, view, value in zip(ids, views, values, strict=True):
            try:
                kept = None if value is None else _Kept.read(value, who)
            except MemberRecordError as error:
                kept = None
                damaged.append(error)
            found.append(kept.vector if kept is not None and kept.view == view else None)
        if damaged:
            log.warning("%d vectors of members are damaged and made anew; the first: %s", len(damaged), damaged[0])
        return found


class _Kept(NamedTuple):
    record: bytes
    view: bytes
    vector: Vector

    @classmethod
    def read(cls, value: bytes, member_id: str) -> _Kept:
        middle = len(MAGIC) + DIGEST_BYTES
        head = middle + DIGEST_BYTES
        whole = value.startswith(MAGIC) and len(value) >= head and (len(value) - head) % 4 == 0
        vector = np.frombuffer(value, "<f4", offset=head).astype(np.float32) if whole else np.full(1, np.nan, np.float32)
        if not np.isfinite(vector).all():
            raise MemberRecordError(
                f"the vector of member {member_id[:80]!r} cannot be read ({len(value)} bytes); "
                "run `brewline nightly` with --members again"
            )
        return cls(value[len(MAGIC) : middle], value[middle:head], vector)


def _digest(stored: bytes) -> bytes:
    """Of a record's bytes without its `as_of`, the last field, which no prompt reads: a night that changes nothing else leaves
    every encoder's vector right, also that of a server which still runs on the encoder before."""
    words, field, moment = stored.rpartition(AS_OF)
    dated = bool(field) and moment.endswith(b"}") and moment[:-1].removeprefix(b"-").isdigit()
    return hashlib.blake2b(words if dated else stored, digest_size=DIGEST_BYTES).digest()
