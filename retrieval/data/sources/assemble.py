"""Items, members and a log in source order become a `Dataset`: rows, time order, event ids, cuts and splits."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.data.events import compact, member_rows
from retrieval.data.meta import LATEST_TIME, no_events, split_by_cuts, unordered
from retrieval.data.refusals import Refusals
from retrieval.data.schema import DAY, FACETS, MISSING_TIME, DataError, Dataset, Events, Items, Members, Meta, action_kind

VALID_FROM, TEST_FROM = 0.8, 0.9
"""Quantiles of engagement time at which the validation and the test window begin, moved back to the start of the day."""


@dataclass(frozen=True)
class Imported:
    """What an importer made, what it refused, and what a reader of the result must know (`notes`, one sentence each)."""

    dataset: Dataset
    refusals: Refusals
    notes: list[str] = field(default_factory=list)


class ItemsBuilder:
    """Collects items one by one; an item without an id, or with an id that was there before, is refused."""

    def __init__(self, file: str, refusals: Refusals, numbers: Sequence[str] = ()) -> None:
        self._file, self._refusals = file, refusals
        self._words: dict[str, list[str]] = {name: [] for name in ("item_id", "title", "text", "category", "creator", *FACETS)}
        self._created = array("q")
        self._numbers = {name: array("d") for name in numbers}
        self.row_of: dict[str, int] = {}

    def add(
        self,
        row: int,
        item_id: str,
        title: str,
        text: str = "",
        category: str = "",
        creator: str = "",
        created_at: int | None = None,
        numbers: Mapping[str, float | None] | None = None,
        language: str = "",
        region: str = "",
    ) -> bool:
        """Whether the item was taken. `row` is its place in the source file."""
        if not item_id.strip():
            self._refusals.one(self._file, row, "item id is missing or empty")
            return False
        if item_id in self.row_of:
            self._refusals.one(self._file, row, "duplicate item id", item_id)
            return False
        self.row_of[item_id] = len(self.row_of)
        for name, word in zip(self._words, (item_id, title, text, category, creator, language, region), strict=True):
            self._words[name].append(word)
        self._created.append(MISSING_TIME if created_at is None else created_at)
        for name, column in self._numbers.items():
            value = (numbers or {}).get(name)
            column.append(math.nan if value is None or not math.isfinite(value) else value)
        return True

    def items(self, keep: npt.NDArray[np.bool_] | None = None) -> Items:
        """The items so far (where `keep` is true); a column of numbers or facets without any value is left out."""
        if not self.row_of:
            raise DataError(
                f"{self._file}: no valid item in it: {self._refusals.mostly(self._file)}; check that it is the original file"
            )
        rows = np.arange(len(self.row_of)) if keep is None else np.flatnonzero(keep)
        numbers = {name: np.frombuffer(column, np.float64)[rows] for name, column in self._numbers.items()}
        words = {name: [column[row] for row in rows] for name, column in self._words.items()}
        facets = {name: found for name in FACETS if any(found := words.pop(name))}
        return Items(
            **words,
            created_at=np.frombuffer(self._created, np.int64)[rows],
            numbers={name: column for name, column in numbers.items() if not np.isnan(column).all()},
            facets=facets,
        )


class Names:
    """Gives each distinct name a code in the order of appearance."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        return self.codes.setdefault(name, len(self.codes))


@dataclass(frozen=True)
class Log:
    """Events in source order, E of each: codes into the name lists, -1 = unknown; `row` is the place in `file`."""

    file: str
    row: npt.NDArray[np.int64]
    member: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]
    action: npt.NDArray[np.int32]
    label: npt.NDArray[np.int8]
    value: npt.NDArray[np.float32]
    member_names: Sequence[str]
    item_names: Sequence[str]
    action_names: Sequence[str]
    request: npt.NDArray[np.int32] | None = None
    request_names: Sequence[str] = ()
    position: npt.NDArray[np.int16] | None = None
    surface: npt.NDArray[np.int32] | None = None
    surface_names: Sequence[str] = ()


class LogBuilder:
    """Collects events one by one in compact arrays."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.members, self.items, self.actions = Names(), Names(), Names()
        self._requests, self._surfaces = Names(), Names()
        self._row, self._time = array("q"), array("q")
        self._member, self._item, self._action = array("i"), array("i"), array("i")
        self._request, self._surface, self._position = array("i"), array("i"), array("h")
        self._label, self._value = array("b"), array("f")

    def add(
        self,
        row: int,
        member: str,
        item: str,
        timestamp: int,
        action: str,
        label: int = -1,
        value: float = math.nan,
        request: str = "",
        position: int = -1,
        surface: str = "",
    ) -> None:
        """The event is the next one of the log; -1, NaN and "" mean unknown."""
        self._row.append(row)
        self._member.append(self.members[member])
        self._item.append(self.items[item])
        self._time.append(timestamp)
        self._action.append(self.actions[action])
        self._label.append(label)
        self._value.append(value)
        self._request.append(self._requests[request] if request else -1)
        self._position.append(position)
        self._surface.append(self._surfaces[surface] if surface else -1)

    @property
    def last_time(self) -> int:
        """The latest timestamp so far; 0 without events."""
        return max(self._time, default=0)

    def log(self) -> Log:
        """The events so far as columns."""
        return Log(
            self.file, np.array(self._row), np.array(self._member), np.array(self._item), np.array(self._time),
            np.array(self._action), np.array(self._label), np.array(self._value), list(self.members.codes),
            list(self.items.codes), list(self.actions.codes), np.array(self._request), list(self._requests.codes),
            np.array(self._position), np.array(self._surface), list(self._surfaces.codes),
        )  # fmt: skip


def assemble(meta: Meta, items: Items, members: Members, log: Log | None, refusals: Refusals) -> Imported:
    """The data set of these parts: cuts at the 0.8 and 0.9 quantile of engagement time, `meta` gives the rest.

    Events of unknown items and with impossible times are refused. Without a log the folder has no cuts.
    """
    if log is None or not len(log.row):
        if log is not None:
            raise DataError(f"{log.file}: no valid event in it: {refusals.mostly(log.file)}; check that it is the original file")
        note = "no interactions: models can learn from the items' text alone, and there is nothing to evaluate on"
        return Imported(Dataset(meta, items, members, no_events()), refusals, [note])
    item = np.array([items.row_of.get(name, -1) for name in log.item_names], np.int32)[log.item]
    order = _order(log, item, meta, refusals)
    member, members = member_rows(log.member[order], _strings(log.member_names), members)
    action, actions = compact(log.action[order].astype(np.int32), _strings(log.action_names))
    request, requests = compact(_or_unknown(log.request, log)[order], _strings(log.request_names))
    surface, surfaces = compact(_or_unknown(log.surface, log)[order], _strings(log.surface_names))
    events = Events(
        np.arange(len(order)), member, item[order], log.timestamp[order], action.astype(np.int16),
        log.label[order].astype(np.int8), log.value[order].astype(np.float32), np.full(len(order), -1, np.int8),
        request, _or_unknown(log.position, log)[order].astype(np.int16), surface.astype(np.int16),
        actions, requests, surfaces,
    )  # fmt: skip
    dataset = Dataset(meta, items, members, events)
    if meta.order == "none":
        note = "no timestamps: events got pseudo-times, so nothing here can be read as a trend or as freshness"
        return Imported(unordered(dataset), refusals, [note])
    return _cut(dataset, refusals)


def _order(log: Log, item: npt.NDArray[np.int32], meta: Meta, refusals: Refusals) -> npt.NDArray[np.int64]:
    """The good events in time order, ties in source order."""
    unknown = item < 0
    names = np.array(log.item_names, object)
    refusals.add(log.file, "item is not among the items", log.row[unknown], names[log.item[unknown]])
    absurd = ~unknown & ((log.timestamp < 0) | (log.timestamp > LATEST_TIME))
    refusals.add(log.file, "timestamp is not in seconds between 1970 and 2100", log.row[absurd], log.timestamp[absurd])
    good = np.flatnonzero(~unknown & ~absurd)
    if not len(good):
        raise DataError(f"{log.file}: none of {len(log.row):,} events is valid; do items and events belong together?")
    return good if meta.order == "none" else good[np.argsort(log.timestamp[good], kind="stable")]


def _cut(dataset: Dataset, refusals: Refusals) -> Imported:
    """The data set with cuts and splits. A log too short for cuts at day starts is cut inside a day, and says so."""
    times = dataset.engagements.timestamp
    if not len(times):
        raise DataError(
            f"no event has one of the actions that count ({', '.join(dataset.meta.retrieval_actions)});"
            f" seen: {', '.join(sorted({action_kind(action) for action in dataset.events.actions}))}"
        )
    exact = [int(np.quantile(times, share, method="lower")) for share in (VALID_FROM, TEST_FROM)]
    cuts, notes = [time // DAY * DAY for time in exact], []
    if not times[0] < cuts[0] < cuts[1]:
        cuts = [max(exact[0], int(times[0]) + 1), max(exact[1], int(times[0]) + 1)]
        notes.append("the log is too short to cut at day starts: validation and test begin inside a day")
    meta = replace(dataset.meta, cut_valid=cuts[0], cut_test=cuts[1])
    split = split_by_cuts(dataset.events.timestamp, cuts[0], cuts[1])
    events = replace(dataset.events, split=split)
    return Imported(replace(dataset, meta=meta, events=events), refusals, notes)


def _strings(names: Sequence[str]) -> pa.Array:
    return pa.array(names, pa.large_string())


def _or_unknown(codes: npt.NDArray[np.integer] | None, log: Log) -> npt.NDArray[np.int32]:
    return np.full(len(log.row), -1, np.int32) if codes is None else codes.astype(np.int32)
