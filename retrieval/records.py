"""What is kept of a member: a record of ids and facts, its bytes, and the view in words that prompts read.

Prompts read a view, never a record. The night makes views from the data folder, the service from a snapshot's catalogue; both go
through `view_of`, so a member reads the same in both. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from retrieval.data.schema import Connection, Dataset, Engagement, Events, Item, Items, Member, MemberView

T = TypeVar("T")
FORMAT = 1
NEWEST = 1_024
"""How many of the newest engagements a view shows in words; the prompts keep fewer. Exclusion uses the whole history."""
DIGEST_BYTES = 16


class MemberRecordError(BrewlineError):
    """A member's bytes in the store cannot be read."""


class Words(Protocol):
    """Where the words of an item are: a snapshot's catalogue, or a data folder."""

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """The row of each id, -1 if unknown."""

    def item(self, row: int) -> Item:
        """The record of a row."""


@dataclass(frozen=True)
class ItemWords:
    """The words of a data folder's items."""

    items: Items

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """The row of each id, -1 if unknown."""
        return np.array([self.items.row_of.get(item_id, -1) for item_id in ids], np.int64)

    def item(self, row: int) -> Item:
        """The record of a row."""
        return self.items[row]


class Entry(NamedTuple):
    """One engagement as it is kept: the item by id, seconds UTC, the action's words, 1 liked, 0 not, None unknown.

    A tuple, because a warm request reads a whole history of them and a frozen dataclass takes twice as long to make.
    """

    item_id: str
    timestamp: int
    action: str
    label: int | None = None


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """All that is kept of one member. `history` oldest first; `as_of`: what happened before this time (seconds) is known."""

    member: Member
    history: tuple[Entry, ...] = ()
    connections: tuple[Connection, ...] = ()
    as_of: int = 0

    @property
    def seen(self) -> list[str]:
        """The ids of the whole history: none of them is to be recommended."""
        return [entry.item_id for entry in self.history]


def view_of(record: MemberRecord, words: Words, instruction: str = "") -> MemberView:
    """The record in words: the newest engagements whose items are known.

    An item that left the catalogue has no words any more, so it is not shown; it stays in `record.seen`.
    """
    newest = record.history[-NEWEST:]
    rows = words.rows([entry.item_id for entry in newest]).tolist()
    known = [(row, entry) for row, entry in zip(rows, newest) if row >= 0]
    history = tuple(Engagement(words.item(row), entry.timestamp, entry.action, entry.label) for row, entry in known)
    return MemberView(record.member, history, record.connections, instruction)


def view_digest(view: MemberView) -> bytes:
    """16 bytes that differ if any word or number of the view differs that a prompt may read: all but the facets of its items."""
    plain = json.dumps(asdict(view, dict_factory=_readable), default=dict, separators=(",", ":")).encode()
    return hashlib.blake2b(plain, digest_size=DIGEST_BYTES).digest()


def _readable(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name != "facets"}


def records_of(dataset: Dataset, as_of: int) -> Iterator[MemberRecord]:
    """The record of every member of a data folder, in its order: the engagements and connections strictly before `as_of`."""
    log = dataset.engagements.before(as_of)
    order = np.argsort(log.member, kind="stable")  # the log is in time order, so each member's part is too
    start = np.searchsorted(log.member[order], np.arange(len(dataset.members) + 1))
    for member in range(len(dataset.members)):
        history = tuple(_entry(log, at, dataset.items.item_id) for at in order[start[member] : start[member + 1]].tolist())
        connections = tuple(dataset.connections_of(member, as_of))
        yield MemberRecord(dataset.members[member], history, connections, as_of)


def _entry(log: Events, at: int, ids: Sequence[str]) -> Entry:
    label = int(log.label[at])
    action = log.actions[int(log.action[at])]
    return Entry(ids[int(log.item[at])], int(log.timestamp[at]), action, None if label < 0 else label)


def encode_record(record: MemberRecord) -> bytes:
    """The bytes kept of a record (versioned JSON); equal records give equal bytes."""
    fields = {
        "format": FORMAT,
        "profile": list(record.member.profile.items()),
        "numbers": [[name, value] for name, value in record.member.numbers.items() if math.isfinite(value)],
        "history": [[entry.item_id, entry.timestamp, entry.action, entry.label] for entry in record.history],
        "connections": [[edge.other_id, edge.kind, edge.since] for edge in record.connections],
        "as_of": record.as_of,
    }
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


class StoredRecord:
    """A record as it was kept, taken apart only as far as it is asked for: a warm request needs ids, and no entries.

    Raises MemberRecordError if the bytes are no record, or one of another format; so does whatever asks for a part that is none.
    """

    __slots__ = ("_fields", "_member_id")

    def __init__(self, stored: bytes, member_id: str) -> None:
        try:
            fields: Mapping[str, Any] = json.loads(stored)
            if fields["format"] != FORMAT:
                raise MemberRecordError(
                    f"the record of member {member_id[:80]!r} is of format {fields['format']}, this version reads {FORMAT}; "
                    "run `brewline nightly` with --members again"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable(member_id, error) from error
        self._fields, self._member_id = fields, member_id

    @property
    def member(self) -> Member:
        """As in MemberRecord."""
        return self._part(lambda held: Member(self._member_id, dict(held["profile"]), dict(held["numbers"])))

    @property
    def connections(self) -> tuple[Connection, ...]:
        """As in MemberRecord."""
        return self._part(lambda held: tuple([Connection(*edge) for edge in held["connections"]]))

    @property
    def seen(self) -> list[str]:
        """As in MemberRecord."""
        return self._part(lambda held: [entry[0] for entry in held["history"]])

    def whole(self) -> MemberRecord:
        """The record. Raises MemberRecordError."""
        history = self._part(lambda held: tuple([Entry(*entry) for entry in held["history"]]))
        return MemberRecord(self.member, history, self.connections, self._part(lambda held: int(held["as_of"])))

    def _part(self, read: Callable[[Mapping[str, Any]], T]) -> T:
        try:
            return read(self._fields)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _unreadable(self._member_id, error) from error


def decode_record(stored: bytes, member_id: str) -> MemberRecord:
    """The record that was kept. Raises MemberRecordError if the bytes are not one, or one of another format."""
    return StoredRecord(stored, member_id).whole()


def _unreadable(member_id: str, error: Exception) -> MemberRecordError:
    return MemberRecordError(
        f"the record of member {member_id[:80]!r} cannot be read ({type(error).__name__}: {error}); "
        "run `brewline nightly` with --members again"
    )
