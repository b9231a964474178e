"""What a data folder holds once it is in memory: columns for many, records for one.

Columns are numpy arrays and lists of equal length; rows are referred to by position (`int32` codes), never by id. The
on-disk schema is `docs/data.md`; `retrieval.data.read` makes these objects from a folder and refuses what does not fit.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError

DAY = 86_400
MISSING_TIME = int(np.iinfo(np.int64).min)
"""Stands for "no time known" in int64 columns; a record shows it as None."""
IMPRESSION = "impression"
"""The action of an event that only says: this item was shown."""
TRAIN, VALID, TEST = 0, 1, 2
COUNT_COLUMNS = frozenset(
    (
        "n_events", "n_members", "n_events_7d", "n_events_30d", "n_pos", "n_neg", "mean_value", "first_ts", "last_ts",
        "n_total", "n_30d", "n_7d", "n_1d", "positive_rate", "age_days", "pooled_rate",
    )
)  # fmt: skip
"""Columns that hold counts over the log: those of the schema, and any that is named as an as-of number. They leak (an example is
inside its own count, and one would stand in the place of the as-of number), so they are never read: every as-of number comes
from the event log through `retrieval.counts` and `retrieval.pooled_rate`."""
FACETS = ("language", "region")
"""Words of an item that are there to choose by and need not be there at all. No prompt reads them: an item whose facets alone
changed reads as it did, and has the same vector."""

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]


class DataError(BrewlineError):
    """A data folder or a row of it does not fit the schema."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item as words and numbers; `facets` by name of FACETS. Empty strings and missing keys mean "unknown"."""

    item_id: str
    title: str = ""
    text: str = ""
    category: str = ""
    creator: str = ""
    created_at: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    facets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member:
    """One member as words and numbers, in the order in which the profile shows them."""

    member_id: str
    profile: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Engagement:
    """One thing a member did with one item, as the history shows it. `label` 1 liked, 0 not, None unknown."""

    item: Item
    timestamp: int
    action: str
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """`other_id` names a member or a creator; `kind` is words ("works with")."""

    other_id: str
    kind: str
    since: int | None = None


@dataclass(frozen=True, slots=True)
class MemberView:
    """All that a prompt may know of one member at one moment: profile, history (oldest first), connections, own wish."""

    member: Member
    history: Sequence[Engagement] = ()
    connections: Sequence[Connection] = ()
    instruction: str = ""


@dataclass(frozen=True)
class Items:
    """N items in columns. `created_at` int64 [N] (MISSING_TIME = unknown); `numbers` name -> float64 [N] (NaN = unknown);
    `facets` name of FACETS -> words [N] ("" = unknown), where the data have such a column."""

    item_id: list[str]
    title: list[str]
    text: list[str]
    category: list[str]
    creator: list[str]
    created_at: npt.NDArray[np.int64]
    numbers: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    facets: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.item_id)

    def __getitem__(self, row: int) -> Item:
        created = int(self.created_at[row])
        known = {name: float(column[row]) for name, column in self.numbers.items() if not np.isnan(column[row])}
        return Item(
            self.item_id[row],
            self.title[row],
            self.text[row],
            self.category[row],
            self.creator[row],
            None if created == MISSING_TIME else created,
            known,
            {name: column[row] for name, column in self.facets.items() if column[row]},
        )

    @cached_property
    def row_of(self) -> dict[str, int]:
        """item id -> row."""
        return {item_id: row for row, item_id in enumerate(self.item_id)}


@dataclass(frozen=True)
class Members:
    """M members in columns: every id that the folder names, with a profile where members.parquet has one ("" elsewhere)."""

    member_id: list[str]
    profile: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.member_id)

    def __getitem__(self, row: int) -> Member:
        words = {name: column[row] for name, column in self.profile.items() if column[row]}
        known = {name: float(column[row]) for name, column in self.numbers.items() if not np.isnan(column[row])}
        return Member(self.member_id[row], words, known)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """member id -> row."""
        return {member_id: row for row, member_id in enumerate(self.member_id)}


@dataclass(frozen=True)
class Events:
    """E events in time order (ties in `event_id` order).

    event_id int64, member int32 (row of Members), item int32 (row of Items), timestamp int64 seconds UTC, action int16
    (position in `actions`), label int8 (1, 0, -1 unknown), value float32 (NaN unknown), split int8 (TRAIN, VALID, TEST),
    request int32 (position in `requests`, -1 none), position int16 (0 = top, -1 unknown), surface int16 (position in
    `surfaces`, -1 unknown).
    """

    event_id: npt.NDArray[np.int64]
    member: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]
    action: npt.NDArray[np.int16]
    label: npt.NDArray[np.int8]
    value: npt.NDArray[np.float32]
    split: npt.NDArray[np.int8]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int16]
    surface: npt.NDArray[np.int16]
    actions: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    surfaces: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.event_id)

    def take(self, which: npt.NDArray[np.bool_] | Ints) -> Events:
        """The events at the given positions (or where the mask is true), in the given order."""
        columns = {name: getattr(self, name)[which] for name in EVENT_COLUMNS}
        return replace(self, **columns)

    @property
    def day(self) -> npt.NDArray[np.int64]:
        """Days since 1970 (UTC) of each event."""
        return self.timestamp // DAY

    def before(self, timestamp: int) -> Events:
        """The events strictly before a time."""
        return self.take(self.timestamp < timestamp)


EVENT_COLUMNS = (
    "event_id", "member", "item", "timestamp", "action", "label", "value", "split", "request", "position", "surface",
)  # fmt: skip


def action_kind(action: str) -> str:
    """The part of an action before the colon: "rating:8" -> "rating"."""
    return action.partition(":")[0]


@dataclass(frozen=True)
class Meta:
    """dataset.json. `cut_valid`, `cut_test` in seconds; `order` "timestamp", or "none" if timestamps carry no time."""

    name: str
    cut_valid: int
    cut_test: int
    retrieval_actions: tuple[str, ...]
    label: str = ""
    value: str = ""
    order: str = "timestamp"
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Connections:
    """Edges in columns: member int32 (row of Members), other_id, kind, since int64 (MISSING_TIME = unknown)."""

    member: npt.NDArray[np.int32]
    other_id: list[str]
    kind: list[str]
    since: npt.NDArray[np.int64]

    @cached_property
    def of_member(self) -> dict[int, list[int]]:
        """member row -> rows of its edges."""
        edges: dict[int, list[int]] = {}
        for row, member in enumerate(self.member.tolist()):
            edges.setdefault(member, []).append(row)
        return edges


@dataclass(frozen=True)
class Dataset:
    """One data folder in memory. `events` may be empty, `connections` None: each command says what it does without them.

    A folder whose `order` is "none" gets pseudo-times here (`retrieval.data.read`), so that no other code has a special case.
    """

    meta: Meta
    items: Items
    members: Members
    events: Events
    connections: Connections | None = None

    @cached_property
    def is_engagement(self) -> npt.NDArray[np.bool_]:
        """Bool [E]: the event's action (before the colon) is one of `meta.retrieval_actions`."""
        wanted = np.array([action_kind(action) in self.meta.retrieval_actions for action in self.events.actions], bool)
        return wanted[self.events.action] if len(self.events) else np.zeros(0, bool)

    @cached_property
    def engagements(self) -> Events:
        """The events that count as engagement: what retrieval learns and what popularity counts."""
        return self.events.take(self.is_engagement)

    def connections_of(self, member: int, before: int | None = None) -> list[Connection]:
        """The member's connections known before a time (all if None)."""
        if self.connections is None:
            return []
        found = []
        for row in self.connections.of_member.get(member, []):
            since = int(self.connections.since[row])
            if before is None or since == MISSING_TIME or since < before:
                moment = None if since == MISSING_TIME else since
                found.append(Connection(self.connections.other_id[row], self.connections.kind[row], moment))
        return found
