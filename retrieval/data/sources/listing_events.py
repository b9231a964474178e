"""The events table of a listing site, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping

from retrieval.data.refusals import Refusals
from retrieval.data.schema import DataError
from retrieval.data.sources.assemble import LogBuilder
from retrieval.data.sources.dates import any_time
from retrieval.data.sources.lines import Progress
from retrieval.data.sources.mapping import EVENT_NAMES, Columns, columns_of, joined
from retrieval.data.sources.table import Table

LABELS = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "": -1}
NO_ACTION = "engagement"
"""The action of events whose table has no action column."""
DEEPEST = 32_767


def read_events(table: Table, maps: Columns, refusals: Refusals, progress: Progress | None) -> tuple[LogBuilder, str]:
    """(events, order): order is "none" if the table has no timestamp column."""
    columns = columns_of(table, maps, EVENT_NAMES)
    missing = [name for name in ("member_id", "item_id") if name not in columns]
    if missing:
        raise DataError(
            f"{table.path}: no {missing[0]} column (columns: {', '.join(table.columns)});"
            f" say which one it is with --map events.{missing[0]}=COLUMN"
        )
    log = LogBuilder(table.path.name)
    for row, record in table.rows(refusals, progress):
        words = {name: joined(record, found) for name, found in columns.items()}
        reason, seen = _add(log, row, words, "timestamp" in columns)
        if reason:
            refusals.one(log.file, row, reason, seen)
    return log, "timestamp" if "timestamp" in columns else "none"


def _add(log: LogBuilder, row: int, words: Mapping[str, str], timed: bool) -> tuple[str, str]:
    """The event is in the log, or (why it is not, what was seen)."""
    if not words["member_id"] or not words["item_id"]:
        return "member_id or item_id is empty", ""
    time = any_time(words["timestamp"]) if timed else 0
    if time is None:
        return "timestamp is not seconds and not like 2024-01-31 10:00:00", words["timestamp"]
    label = LABELS.get(words.get("label", "").lower())
    if label is None:
        return "label is not 1, 0, true, false, yes, no or empty", words["label"]
    position = words.get("position", "")
    if position and not (position.isdecimal() and int(position) <= DEEPEST):
        return f"position is not a whole number from 0 to {DEEPEST:,}", position
    value = words.get("value", "")
    try:
        amount = float(value) if value else math.nan
    except ValueError:
        return "value is not a number", value
    log.add(
        row, words["member_id"], words["item_id"], time, words.get("action") or NO_ACTION, label,
        amount if math.isfinite(amount) else math.nan, words.get("request_id", ""), int(position or -1),
        words.get("surface", ""),
    )  # fmt: skip
    return "", ""
