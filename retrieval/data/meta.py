"""dataset.json: what the actions, labels and cuts of a folder mean, and what becomes of a folder without times."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval.data.refusals import shown
from retrieval.data.schema import (
    DAY,
    MISSING_TIME,
    TEST,
    TRAIN,
    VALID,
    DataError,
    Dataset,
    Events,
    Meta,
    action_kind,
)

LATEST_TIME = 4_102_444_800
"""2100-01-01. A later "time" is milliseconds or garbage."""
ORDERS = ("timestamp", "none")
META_FIELDS = ("name", "cut_valid", "cut_test", "retrieval_actions", "label", "value", "order")
MOST_NAMES = 5
PSEUDO_CUT_VALID = 80 * DAY
PSEUDO_CUT_TEST = 90 * DAY
PSEUDO_END = 100 * DAY


def read_meta(folder: Path, has_events: bool) -> Meta:
    """dataset.json as `Meta`; what is not of the schema goes into `extra`. Cuts and actions are required with events."""
    path = folder / "dataset.json"
    found = _read_object(path)
    order = found.get("order", "timestamp")
    if order not in ORDERS:
        raise DataError(f'{path}: "order" is {order!r}, expected "timestamp" or "none"')
    timed = has_events and order == "timestamp"
    cut_valid, cut_test = _cut(path, found, "cut_valid", timed), _cut(path, found, "cut_test", timed)
    if cut_valid > cut_test:
        raise DataError(f'{path}: "cut_valid" ({cut_valid}) is after "cut_test" ({cut_test}); exchange them')
    return Meta(
        name=_word(path, found, "name") or folder.resolve().name,
        cut_valid=cut_valid,
        cut_test=cut_test,
        retrieval_actions=_actions(path, found, has_events),
        label=_word(path, found, "label"),
        value=_word(path, found, "value"),
        order=order,
        extra={key: value for key, value in found.items() if key not in META_FIELDS},
    )


def _read_object(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise DataError(f"dataset.json is missing in {path.parent}: it is required, the schema is in docs/data.md")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); write it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a JSON {type(found).__name__}, expected an object with name, cuts and actions")
    return found


def _cut(path: Path, found: dict[str, object], key: str, needed: bool) -> int:
    value = found.get(key)
    if value is None and not needed:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LATEST_TIME:
        raise DataError(f'{path}: "{key}" is {value!r}, expected whole seconds since 1970 (UTC) below the year 2100')
    return value


def _word(path: Path, found: dict[str, object], key: str) -> str:
    value = found.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f'{path}: "{key}" is {value!r}, expected a string')
    return value or ""


def _actions(path: Path, found: dict[str, object], needed: bool) -> tuple[str, ...]:
    value = found.get("retrieval_actions", [] if not needed else None)
    if not isinstance(value, list) or not all(isinstance(action, str) and action for action in value):
        raise DataError(f'{path}: "retrieval_actions" is {value!r}, expected a list of words such as ["rating"]')
    if needed and not value:
        raise DataError(f'{path}: "retrieval_actions" is empty; name the actions that count as an engagement')
    return tuple(value)


def uncounted(dataset: Dataset) -> str:
    """Says what is wrong where a log has events and none of them counts as an engagement; "" everywhere else."""
    if not len(dataset.events) or dataset.is_engagement.any():
        return ""
    seen = _some(dict.fromkeys(map(action_kind, dataset.events.actions)))
    return (
        f'none of {len(dataset.events):,} events counts as an engagement: "retrieval_actions" of dataset.json names '
        f"{_some(dataset.meta.retrieval_actions)}, the actions seen are {seen}; name those that count, without a colon and what "
        "follows it"
    )


def _some(names: Collection[str]) -> str:
    said = ", ".join(repr(shown(name)) for name in list(names)[:MOST_NAMES])
    return f"{said} and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else said


def unordered(dataset: Dataset) -> Dataset:
    """The data set with pseudo-times, so that no other code has a special case for folders without time.

    Each event falls on a second of 100 pseudo-days from 1970-01-01 that depends on its event_id alone: train on days 0
    to 79, valid on 80 to 89, test on 90 to 99, the cuts between. A split that the folder gives is kept (split -1 = not
    given). Real times cannot be compared with these, so `created_at` and `since` become unknown.
    """
    events = dataset.events
    spread = _spread(events.event_id)
    split = np.where(events.split >= 0, events.split, _split_of((spread * PSEUDO_END).astype(np.int64)))
    starts = np.array([0, PSEUDO_CUT_VALID, PSEUDO_CUT_TEST])[split]
    lengths = np.array([PSEUDO_CUT_VALID, PSEUDO_CUT_TEST - PSEUDO_CUT_VALID, PSEUDO_END - PSEUDO_CUT_TEST])[split]
    # Another stretch of the same hash: inside the split the second must not depend on how the split was found.
    seconds = starts + (_spread(events.event_id ^ np.int64(0x5DEECE66D)) * lengths).astype(np.int64)
    timed = replace(events, timestamp=seconds, split=split.astype(np.int8))
    timed = timed.take(np.lexsort((timed.event_id, timed.timestamp)))
    items, edges = dataset.items, dataset.connections
    return replace(
        dataset,
        meta=replace(dataset.meta, cut_valid=PSEUDO_CUT_VALID, cut_test=PSEUDO_CUT_TEST),
        items=replace(items, created_at=np.full(len(items), MISSING_TIME, np.int64)),
        events=timed,
        connections=edges and replace(edges, since=np.full(len(edges.member), MISSING_TIME, np.int64)),
    )


def split_by_cuts(timestamp: npt.NDArray[np.int64], cut_valid: int, cut_test: int) -> npt.NDArray[np.int8]:
    """TRAIN before `cut_valid`, VALID before `cut_test`, TEST from there on; int8 [n]."""
    late = np.where(timestamp < cut_test, VALID, TEST)
    return np.where(timestamp < cut_valid, TRAIN, late).astype(np.int8)


def _split_of(timestamp: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    return split_by_cuts(timestamp, PSEUDO_CUT_VALID, PSEUDO_CUT_TEST)


def _spread(event_id: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each event, the same on every machine: the finaliser of splitmix64 (Steele et al., 2014)."""
    mixed = event_id.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def no_events() -> Events:
    """The event log of a folder without one."""
    wide, row, small = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int16)
    tiny, value = np.zeros(0, np.int8), np.zeros(0, np.float32)
    return Events(
        event_id=wide, member=row, item=row, timestamp=wide, action=small, label=tiny, value=value, split=tiny,
        request=row, position=small, surface=small,
    )  # fmt: skip
