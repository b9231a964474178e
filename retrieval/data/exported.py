"""Tomorrow's training folder: yesterday's, grown by what servers showed and members did since.

Impressions come from the journal, engagements from the journal and from the member store, where each was acknowledged; an event
counts once whoever tells it. An engagement that names the request which showed its item decides that impression's label; the rule
of the schema (`docs/data.md`) that no outcome is counted twice holds: if it says itself whether the member liked the item, the
label stays with it, else it goes to the impression. An event's number is a hash of its names, so exporting twice makes the same
folder, and one that a base folder holds already is replaced by what is known now, where that is more: a base folder chained of
exports outlives journals and the member store's memory.

The folder knows the world up to a moment. What was shown later may still be answered, and waits for the next export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.data.exported_events import Columns, events_of, grown_members, identity
from retrieval.data.exported_journal import Done, Record, Shown
from retrieval.data.exported_labels import Judge, Shows, carried
from retrieval.data.meta import split_by_cuts
from retrieval.data.refusals import Refusals
from retrieval.data.schema import DAY, EVENT_COLUMNS, IMPRESSION, DataError, Dataset, Events
from retrieval.data.sources.assemble import TEST_FROM, VALID_FROM

Cuts = tuple[int, int]


@dataclass(frozen=True)
class Exported:
    """The grown folder. `shown` impressions and `done` engagements are new in it, `joined` of those have their impression in it.

    `waiting` happened after the moment up to which the folder knows; `repeated` events were told more than once, or are in the
    base folder under another number. What was left out for a fault is in `refusals`: lines of the journal, and events by item.
    """

    dataset: Dataset
    shown: int
    done: int
    joined: int
    waiting: int
    repeated: int
    refusals: Refusals


def export(
    base: Dataset, records: Iterable[Record], kept: Iterable[Done], refusals: Refusals, until: int, cuts: Cuts | None = None
) -> Exported:
    """The base folder with everything of the journal (`records`) and the member store (`kept`) that happened before `until`.

    `refusals` is what reading `records` fills. Without `cuts` (seconds) they are moved to the days of the 0.8 and 0.9 quantile
    of engagement time, as importers set them, and never back. Raises DataError for a base folder without times or actions.
    """
    meta = base.meta
    if meta.order != "timestamp" or not meta.retrieval_actions:
        lacks = "no times" if meta.order != "timestamp" else "no retrieval_actions"
        raise DataError(
            f"data set {meta.name!r} has {lacks}: a log of what was served cannot continue it; write dataset.json with order, "
            "cuts and retrieval_actions"
        )
    shown, done, repeated = _sorted_out(records, kept)
    columns = Columns()
    told = Judge.of(done.values(), meta.retrieval_actions)
    judge = told.knowing(base, {request for request, _, _ in (*shown, *told.named)})
    base = judge.over(base, told.named)
    joined, waiting = _add(columns, shown, done, judge, meta.retrieval_actions[0], until)
    members, rows = grown_members(base.members, columns.members)
    fresh, item = events_of(columns, base, rows)
    known = _fits(columns, item, refusals)
    others = _others(base.events, fresh.event_id)
    others = others.take(np.isin(others.timestamp, fresh.timestamp))  # few: the rest need not be looked at one by one
    again = known & np.isin(identity(fresh), identity(others))
    fresh = fresh.take(known & ~again)
    events = _merged(base.events, fresh)
    dataset = _cut(replace(base, members=members, events=events), cuts)
    count = int((fresh.action == fresh.actions.index(IMPRESSION)).sum()) if IMPRESSION in fresh.actions else 0
    return Exported(dataset, count, len(fresh) - count, joined, waiting, repeated + int(again.sum()), refusals)


def number_of(*names: str) -> int:
    """A number for an event of these names: 62 bits of a hash, above every number that a source counts its events by."""
    told = "\0".join(names).encode()
    return (1 << 62) | (int.from_bytes(hashlib.blake2b(told, digest_size=8).digest()) >> 2)


def _sorted_out(
    records: Iterable[Record], kept: Iterable[Done]
) -> tuple[dict[Shows, tuple[Shown, int]], dict[tuple[str, str], Done], int]:
    """Impressions by name with their place in the answer, engagements by member and event id, and how many were told again.

    What the member store kept of an engagement is what its member's record says; the journal also has later attempts to tell it.
    """
    shown: dict[Shows, tuple[Shown, int]] = {}
    done: dict[tuple[str, str], Done] = {}
    told = 0
    for one in records:
        if isinstance(one, Done):
            before = done.get((one.member, one.event), one)
            done[one.member, one.event] = min(before, one, key=lambda each: each.timestamp)
            told += 1
        else:
            for place, item in enumerate(one.items):
                shown.setdefault((one.request, one.member, item), (one, place))
            told += len(one.items)
    repeated = told - len(shown) - len(done)
    for own in kept:
        noted = done.get((own.member, own.event), own)
        done[own.member, own.event] = replace(own, request=own.request or noted.request, surface=own.surface or noted.surface)
    return shown, done, repeated


def _add(
    columns: Columns,
    shown: Mapping[Shows, tuple[Shown, int]],
    done: Mapping[tuple[str, str], Done],
    judge: Judge,
    first: str,
    until: int,
) -> tuple[int, int]:
    """The events before `until` are in the columns; returns how many engagements found their impression, and how many wait."""
    joined = waiting = 0
    for name, (one, place) in shown.items():
        if one.at >= until:
            waiting += 1
            continue
        number = number_of(IMPRESSION, *name)
        columns.add(number, one.member, name[2], one.at, IMPRESSION, judge.label(name), one.request, place, one.surface)
    for told in done.values():
        if told.timestamp >= until:
            waiting += 1
            continue
        by = shown.get((told.request, told.member, told.item))
        joined += by is not None
        label = -1 if told.label is None else told.label
        surface = told.surface or (by[0].surface if by is not None else "")
        action = told.action or first
        number = number_of("engagement", told.member, told.event)
        place = -1 if by is None else by[1]
        columns.add(number, told.member, told.item, told.timestamp, action, label, told.request, place, surface)
    return joined, waiting


def _fits(columns: Columns, item: npt.NDArray[np.int32], refusals: Refusals) -> npt.NDArray[np.bool_]:
    """Whether each event's item is in the folder; those of others are refused, named by their item."""
    known = item >= 0
    unknown = np.flatnonzero(~known)
    refusals.add(
        "what was served", "item is in neither the folder nor the store", unknown, [columns.item[row] for row in unknown]
    )
    return known


def _others(events: Events, numbers: npt.NDArray[np.int64]) -> Events:
    return events.take(~np.isin(events.event_id, numbers))


def _merged(base: Events, fresh: Events) -> Events:
    """Both in time order; of an event that both have, the fresh one, with what only the base knows of it. `fresh` has the codes
    of `base` and more."""
    older, fresh = _others(base, fresh.event_id), carried(base, fresh)
    columns: dict[str, Any] = {name: np.concatenate([getattr(older, name), getattr(fresh, name)]) for name in EVENT_COLUMNS}
    both = replace(fresh, **columns)
    return both.take(np.lexsort((both.event_id, both.timestamp)))


def _cut(dataset: Dataset, cuts: Cuts | None) -> Dataset:
    times = dataset.engagements.timestamp
    if cuts is None and len(times):
        exact = [int(np.quantile(times, share, method="lower")) for share in (VALID_FROM, TEST_FROM)]
        found = [time // DAY * DAY for time in exact]
        if not times[0] < found[0] < found[1]:  # too short a log to cut at the start of days
            found = [max(time, int(times[0]) + 1) for time in exact]
        cuts = max(found[0], dataset.meta.cut_valid), max(found[1], dataset.meta.cut_test)
    valid, test = cuts or (dataset.meta.cut_valid, dataset.meta.cut_test)
    if valid > test:
        raise DataError(f"the validation cut ({valid}) is after the test cut ({test}); exchange them")
    events = replace(dataset.events, split=split_by_cuts(dataset.events.timestamp, valid, test))
    return replace(dataset, meta=replace(dataset.meta, cut_valid=valid, cut_test=test), events=events)
