"""What members did since the night: appended by the service, laid behind the night's record, forgotten once a night knows it.

A night replaces a member's record as a whole, so what the service is told lies beside it, under a key of its own. Appending is a
compare-and-swap: servers, threads and a night may work on the same member, and nothing that was acknowledged is lost.

What is forgotten leaves its id, without the rest: told again, perhaps as of another moment, it still counts once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from index.keyvalue import KeyValueStore, StoreUnavailable
from retrieval.data.exported_journal import Done
from retrieval.data.refusals import Refusals
from retrieval.data.schema import DAY, Member
from retrieval.records import Entry, MemberRecord, MemberRecordError

RECENT = "member-recent"
RECENT_DAYS = 30
"""Days that they stay after the last of them: far longer than it takes until a night has read them in the data. So many days,
too, the id of one that was forgotten is known."""
MOST = 2_048
"""Of one member, and as many ids of what was forgotten; the oldest leave first. Several times what a prompt shows."""
AT_ONCE = 512
ATTEMPTS = 50
"""How often an append is tried while others append to the same member at the same moment."""


@dataclass(frozen=True, slots=True)
class Told:
    """One engagement under the id that whoever told it gave it, and where it was shown: `request_id`, `surface`, "" unknown."""

    event_id: str
    entry: Entry
    request_id: str = ""
    surface: str = ""


def decode_told(stored: bytes | None, member_id: str) -> list[Told]:
    """What was told of a member, oldest first. Raises MemberRecordError if the bytes are not that."""
    return _decoded(stored, member_id)[0]


def _decoded(stored: bytes | None, member_id: str) -> tuple[list[Told], dict[str, int]]:
    """What was told of a member, and until when (seconds) the ids of what was forgotten are known. Raises MemberRecordError."""
    if stored is None:
        return [], {}
    try:
        rows = json.loads(stored)
        told = [Told(event_id, Entry(*rest[:4]), *rest[4:]) for event_id, *rest in rows if len(rest) != 1]
        return told, {event_id: int(rest[0]) for event_id, *rest in rows if len(rest) == 1}
    except (ValueError, TypeError) as error:
        raise MemberRecordError(
            f"what member {member_id[:80]!r} did since the night cannot be read ({type(error).__name__}: {error}); "
            f"delete {RECENT!r} of that member"
        ) from error


def with_told(record: MemberRecord, told: Sequence[Told]) -> MemberRecord:
    """The record with what it does not know yet in its history, oldest first; the same record if it knows all of it."""
    if not told:
        return record
    known = {_what(entry) for entry in record.history}
    new = [one.entry for one in told if _what(one.entry) not in known]
    if not new:
        return record
    history = sorted([*record.history, *new], key=lambda entry: entry.timestamp)
    return MemberRecord(record.member, tuple(history), record.connections, record.as_of)


def stranger(member_id: str) -> MemberRecord:
    """The record of a member of whom no night has told anything."""
    return MemberRecord(Member(member_id))


def append(store: KeyValueStore, record: MemberRecord, new: Sequence[Told], now: int) -> int:
    """The engagements are in the store, each once, in time order; returns how many were not known before.

    Known is one with the id of another, also of one that was forgotten in the `RECENT_DAYS` before `now` (seconds), and one that
    the night's `record` holds. Raises StoreUnavailable if others append to this member without a pause.
    """
    who, known = record.member.member_id, {_what(entry) for entry in record.history}
    for _ in range(ATTEMPTS):
        (stored,) = store.get_many(RECENT, [who])
        before, forgotten = _decoded(stored, who)
        forgotten = {event_id: until for event_id, until in forgotten.items() if until > now}
        seen = {one.event_id for one in before} | forgotten.keys()
        added = [one for one in {one.event_id: one for one in new}.values() if one.event_id not in seen]
        added = [one for one in added if _what(one.entry) not in known]
        if not added:
            return 0
        # What the night knows by now leaves, so that the value stays about as short as a day.
        kept = [one for one in before if _what(one.entry) not in known]
        after = sorted([*kept, *added], key=lambda one: one.entry.timestamp)[-MOST:]
        left = {one.event_id for one in (*before, *added)} - {one.event_id for one in after}
        ids = [*forgotten.items(), *((event_id, now + RECENT_DAYS * DAY) for event_id in sorted(left))][-MOST:]
        if store.swap(RECENT, who, stored, _encoded(after, ids), ttl_s=RECENT_DAYS * DAY):
            return len(added)
    raise StoreUnavailable(f"member {who[:80]!r} is being written by too many at once; ask again in a moment")


def acknowledged(store: KeyValueStore, refusals: Refusals) -> Iterator[Done]:
    """Everything that the store was told of any member and still keeps is yielded; what cannot be read is in `refusals`."""
    ids = store.ids(RECENT)
    while batch := list(islice(ids, AT_ONCE)):
        for row, (who, stored) in enumerate(zip(batch, store.get_many(RECENT, batch))):
            try:
                told = decode_told(stored, who)
            except MemberRecordError as error:
                refusals.one("member store", row, str(error), who)
                continue
            for one in told:
                entry = one.entry
                yield Done(
                    who, one.event_id, entry.item_id, entry.timestamp, entry.action, entry.label, one.request_id, one.surface
                )


def _what(entry: Entry) -> tuple[str, int, str]:
    """What makes two entries the same: a label may be known to one side only."""
    return entry.item_id, entry.timestamp, entry.action


def _encoded(told: Sequence[Told], forgotten: Sequence[tuple[str, int]]) -> bytes:
    rows: list[Sequence[str | int | None]] = [*forgotten]
    for one in told:
        entry = one.entry
        shown = [one.request_id, one.surface] if one.request_id or one.surface else []
        rows.append([one.event_id, entry.item_id, entry.timestamp, entry.action, entry.label, *shown])
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
