"""interactions.parquet becomes `Events`: ids become rows, times are checked, the log is put in time order.

Everything works on whole columns (25 million ratings are a normal file): ids are dictionary encoded while Parquet is
read, and each check is one mask.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.data.columns import Sheet
from retrieval.data.meta import LATEST_TIME, no_events, split_by_cuts
from retrieval.data.refusals import Refusals
from retrieval.data.schema import TEST, TRAIN, VALID, DataError, Events, Items, Members, Meta

REQUIRED = ("event_id", "member_id", "item_id", "action")
OPTIONAL = ("timestamp", "label", "value", "split", "request_id", "position", "surface")
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}
SMALL = 32_767
"""The largest int16: more positions in one answer, or more distinct actions in one folder, are not believed."""

Codes = npt.NDArray[np.int32]


def read_events(path: Path, meta: Meta, items: Items, members: Members, refusals: Refusals) -> tuple[Events, Members]:
    """The event log in time order, and the members with those added (empty profile) that only the log names.

    With `meta.order` "none" the timestamps are not looked at (0) and a split that is not given is -1.
    Raises DataError if the file is malformed or no row of it is valid.
    """
    timed = meta.order == "timestamp"
    required = (*REQUIRED, "timestamp") if timed else REQUIRED
    sheet = Sheet(path, refusals, required, OPTIONAL)
    if not len(sheet):
        return no_events(), members
    event_id, _ = sheet.whole("event_id", needed=True)
    member, member_words = sheet.codes("member_id", needed=True)
    item, item_words = sheet.codes("item_id", needed=True)
    timestamp = _times(sheet) if timed else np.zeros(len(sheet), np.int64)
    action, actions = sheet.codes("action", needed=True)
    request, requests = sheet.codes("request_id", needed=False)
    surface, surfaces = sheet.codes("surface", needed=False)
    item = _item_rows(sheet, item, item_words, items)
    label, position = _labels(sheet), _positions(sheet)
    value = sheet.numbers("value").astype(np.float32)
    split = _splits(sheet, timestamp, meta)
    _refuse_repeated(sheet, event_id)
    order = _order(sheet, timestamp, event_id)
    request, request_names = compact(request[order], requests)
    action, action_names = compact(action[order], actions)
    surface, surface_names = compact(surface[order], surfaces)
    if max(len(action_names), len(surface_names)) > SMALL:
        raise DataError(f"{path}: more than {SMALL:,} distinct actions or surfaces; a column holds something else")
    member, members = member_rows(member[order], member_words, members)
    events = Events(
        event_id[order], member, item[order], timestamp[order], action.astype(np.int16), label[order], value[order],
        split[order], request, position[order], surface.astype(np.int16), action_names, request_names, surface_names,
    )  # fmt: skip
    return events, members


def _times(sheet: Sheet) -> npt.NDArray[np.int64]:
    timestamp, _ = sheet.whole("timestamp", needed=True)
    sheet.refuse(timestamp < 0, "timestamp is negative", timestamp)
    sheet.refuse(timestamp > LATEST_TIME, "timestamp is after the year 2100 (milliseconds? seconds expected)", timestamp)
    return timestamp


def _item_rows(sheet: Sheet, codes: Codes, words: pa.Array, items: Items) -> Codes:
    rows = np.asarray(pc.index_in(words, pa.array(items.item_id, pa.large_string())).fill_null(-1)).astype(np.int32)
    found = np.append(rows, np.int32(-1))[codes]
    sheet.refuse(found < 0, "item_id is not in items.parquet", sheet.table.column("item_id"))
    return found


def _labels(sheet: Sheet) -> npt.NDArray[np.int8]:
    label, missing = sheet.whole("label", needed=False)
    sheet.refuse(~missing & (label != 0) & (label != 1), "label is not 0, 1 or null", label)
    return np.where(missing, -1, np.clip(label, 0, 1)).astype(np.int8)


def _positions(sheet: Sheet) -> npt.NDArray[np.int16]:
    position, missing = sheet.whole("position", needed=False)
    sheet.refuse(position < 0, "position is negative (0 is the top)", position)
    sheet.refuse(position > SMALL, f"position is over {SMALL:,}", position)
    return np.where(missing, -1, np.clip(position, 0, SMALL)).astype(np.int16)


def _splits(sheet: Sheet, timestamp: npt.NDArray[np.int64], meta: Meta) -> npt.NDArray[np.int8]:
    if "split" not in sheet:
        if meta.order == "none":
            return np.full(len(sheet), -1, np.int8)
        return split_by_cuts(timestamp, meta.cut_valid, meta.cut_test)
    codes, words = sheet.codes("split", needed=True)
    known = np.array([SPLITS.get(word, -1) for word in words.to_pylist()] + [-1], np.int8)
    sheet.refuse(known[codes] < 0, "split is not train, valid or test", sheet.table.column("split"))
    return known[codes]


def _refuse_repeated(sheet: Sheet, event_id: npt.NDArray[np.int64]) -> None:
    """Of the good rows that share an event_id, all but the first are refused."""
    good = np.flatnonzero(sheet.ok)
    ids = event_id[good]
    if np.all(ids[1:] > ids[:-1]):
        return
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order][1:] == ids[order][:-1]) + 1
    repeated = np.zeros(len(sheet), bool)
    repeated[good[order[again]]] = True
    sheet.refuse(repeated, "duplicate event_id", event_id)


def _order(sheet: Sheet, timestamp: npt.NDArray[np.int64], event_id: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The good rows in time order, ties in event_id order."""
    good = np.flatnonzero(sheet.ok)
    if not len(good):
        raise DataError(f"{sheet.file}: none of {len(sheet):,} rows is valid; {sheet.refusals.mostly(sheet.file)}")
    step, ids = np.diff(timestamp[good]), event_id[good]
    if np.all((step > 0) | ((step == 0) & (ids[1:] > ids[:-1]))):
        return good
    return good[np.lexsort((ids, timestamp[good]))]


def _first_seen(codes: Codes, size: int) -> npt.NDArray[np.int64]:
    """The codes that occur (of 0 .. size-1; -1 is nothing), in the order of their first occurrence."""
    first = np.full(size + 1, len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    used = np.flatnonzero(first[:-1] < len(codes))
    return used[np.argsort(first[used])]


def compact(codes: Codes, words: pa.Array) -> tuple[Codes, tuple[str, ...]]:
    """The codes renumbered by first occurrence: the same log gives the same codes however its file was written."""
    used = _first_seen(codes, len(words))
    renumbered = np.full(len(words) + 1, -1, np.int32)
    renumbered[used] = np.arange(len(used), dtype=np.int32)
    return renumbered[codes], tuple(words.take(pa.array(used)).to_pylist())


def member_rows(codes: Codes, words: pa.Array, members: Members) -> tuple[Codes, Members]:
    """Member codes become rows; members that only the log names come after those with a profile, in order of appearance."""
    codes, names = compact(codes, words)
    known = pa.array(members.member_id, pa.large_string())
    found = np.asarray(pc.index_in(pa.array(names, pa.large_string()), known).fill_null(-1)).astype(np.int32)
    new = np.flatnonzero(found < 0)
    found[new] = len(members) + np.arange(len(new), dtype=np.int32)
    grown = replace(
        members,
        member_id=members.member_id + [names[row] for row in new],
        profile={name: column + [""] * len(new) for name, column in members.profile.items()},
        numbers={name: np.append(column, np.full(len(new), np.nan)) for name, column in members.numbers.items()},
    )
    return found[codes], grown
