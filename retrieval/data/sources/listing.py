"""The listing site that has only a table: items from one CSV file, events and members from others if there are any.

`--map NAME=COLUMN` says which column is what. NAME is a name of the schema (`title`, `text`, `timestamp`, ...), of one file
only with `items.`, `events.` or `members.` before it; any other NAME of the items is a number. A NAME may be given several
times for words: the columns are joined. A column that carries a schema name needs no mapping.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrieval.data.refusals import Refusals
from retrieval.data.schema import FACETS, IMPRESSION, DataError, Items, Members, Meta, action_kind
from retrieval.data.sources.assemble import Imported, ItemsBuilder, LogBuilder, assemble
from retrieval.data.sources.dates import any_time
from retrieval.data.sources.lines import Progress
from retrieval.data.sources.listing_events import read_events
from retrieval.data.sources.mapping import Columns, columns_of, joined, parse_maps
from retrieval.data.sources.table import Table, open_table

WORDS = ("title", "text", "category", "creator", *FACETS)
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+\.\d+")
"""The only commas that are surely not decimal ones."""
ITEM_NAMES = ("item_id", *WORDS, "created_at")


@dataclass(frozen=True)
class Listing:
    """What to import: the files, the mappings as given ("title=name"), the actions that count (none: all but impressions)."""

    items: Path
    events: Path | None = None
    members: Path | None = None
    maps: Sequence[str] = ()
    actions: Sequence[str] = ()
    name: str = "listing"
    label: str = ""
    value: str = ""


def import_listing(listing: Listing, progress: Progress | None = None) -> Imported:
    """The data set of the tables. Without events it has items alone; without a timestamp column its order is "none"."""
    files = {"items": listing.items, "events": listing.events, "members": listing.members}
    tables = {kind: open_table(path) for kind, path in files.items() if path is not None}
    maps = parse_maps(listing.maps, tables)
    refusals, notes = Refusals(), [note for table in tables.values() for note in table.notes]
    items = _read_items(tables["items"], maps["items"], refusals, notes, progress)
    members = _read_members(tables["members"], maps["members"], refusals) if "members" in tables else Members([])
    log, order = None, "timestamp"
    counting: tuple[str, ...] = ()
    if "events" in tables:
        log, order = read_events(tables["events"], maps["events"], refusals, progress)
        counting = _counting(listing, log, notes)
    meta = Meta(listing.name, 0, 0, counting, listing.label, listing.value, order, {"source": "csv"})
    imported = assemble(meta, items, members, None if log is None else log.log(), refusals)
    return Imported(imported.dataset, refusals, [*notes, *imported.notes])


def _read_items(table: Table, maps: Columns, refusals: Refusals, notes: list[str], progress: Progress | None) -> Items:
    columns = columns_of(table, maps, ITEM_NAMES)
    if "title" not in columns and "text" not in columns:
        raise DataError(
            f"{table.path}: neither a title nor a text column (columns: {', '.join(table.columns)});"
            " say which one it is with --map title=COLUMN"
        )
    if "item_id" not in columns:
        notes.append("no id column: items are named after their row, so the same order must be kept in later exports")
    numbers = {name: found[0] for name, found in maps.items() if name not in ITEM_NAMES}
    builder, none = ItemsBuilder(table.path.name, refusals, tuple(numbers)), dict[str, tuple[int, str]]()
    for row, record in table.rows(refusals, progress):
        words = {name: joined(record, columns[name]) for name in WORDS if name in columns}
        if not words.get("title") and not words.get("text"):
            refusals.one(table.path.name, row, "neither a title nor a text")
            continue
        written = joined(record, columns["created_at"]) if "created_at" in columns else ""
        created = any_time(written)
        if written and created is None:
            refusals.one(table.path.name, row, "created_at is not seconds and not like 2024-01-31", written)
            continue
        item_id = joined(record, columns["item_id"]) if "item_id" in columns else f"row-{row}"
        values = {name: _number(record[column]) for name, column in numbers.items()}
        for name in [name for name, value in values.items() if value is None and record[numbers[name]].strip()]:
            count, first = none.get(name, (0, f"{record[numbers[name]].strip()[:40]!r} in row {row}"))
            none[name] = (count + 1, first)
        builder.add(row, item_id, **{"title": "", **words}, created_at=created, numbers=values)
    _note_unused(table, columns, numbers, notes)
    notes += [
        f"values of {name} that are no numbers (as 1299.00 is): {count:,}, first {one}" for name, (count, one) in none.items()
    ]
    return builder.items()


def _note_unused(table: Table, columns: Columns, numbers: Mapping[str, str], notes: list[str]) -> None:
    used = {column for found in columns.values() for column in found} | set(numbers.values())
    unused = [column for column in table.columns if column not in used]
    if unused:
        notes.append(f"columns of {table.path.name} that are not used: {', '.join(unused)} (--map takes them in)")


def _read_members(table: Table, maps: Columns, refusals: Refusals) -> Members:
    """Every column is a profile field, or, where `members.NAME=COLUMN` names some of them, only those."""
    columns = columns_of(table, maps, ("member_id",))
    if "member_id" not in columns:
        raise DataError(f"{table.path}: no member_id column; say which one it is with --map member_id=COLUMN")
    named = {name: found for name, found in maps.items() if name != "member_id"}
    rest = {name: [name] for name in table.columns if name not in columns["member_id"]}
    fields = named or rest
    profile: dict[str, list[str]] = {name: [] for name in fields}
    ids: dict[str, None] = {}
    for row, record in table.rows(refusals):
        member = joined(record, columns["member_id"])
        if not member or member in ids:
            refusals.one(table.path.name, row, "member id is empty or was there before", member)
            continue
        ids[member] = None
        for name, found in fields.items():
            profile[name].append(joined(record, found))
    return Members(list(ids), profile)


def _counting(listing: Listing, log: LogBuilder, notes: list[str]) -> tuple[str, ...]:
    """The actions that count as an engagement: those asked for, else every one but impressions."""
    seen = dict.fromkeys(action_kind(action) for action in log.actions.codes)
    if listing.actions:
        missing = [action for action in listing.actions if action not in seen]
        if missing:
            raise DataError(f"--action {missing[0]!r} is in no event; actions seen: {', '.join(seen) or 'none'}")
        return tuple(listing.actions)
    counting = tuple(action for action in seen if action != IMPRESSION)
    notes.append(f"actions that count as an engagement: {', '.join(counting)} (choose with --action)")
    return counting


def _number(text: str) -> float | None:
    """The number in a cell such as "12.50" or "1,299.00"; None for anything else."""
    try:
        value = float(text.replace(",", "") if THOUSANDS.fullmatch(text.strip()) else text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
