"""`--map NAME=COLUMN`: which column of which table is what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from retrieval.data.schema import COUNT_COLUMNS, DataError
from retrieval.data.sources.lines import clean
from retrieval.data.sources.table import Table

EVENT_NAMES = ("member_id", "item_id", "timestamp", "action", "label", "value", "request_id", "position", "surface")
SHARED = {"item_id": ("items", "events"), "member_id": ("events", "members")}
KINDS = ("items", "events", "members")

Columns = Mapping[str, Sequence[str]]


def parse_maps(maps: Sequence[str], tables: Mapping[str, Table]) -> dict[str, dict[str, list[str]]]:
    """kind of file -> NAME -> columns. Raises DataError for a mapping that no table can follow.

    A NAME without a kind belongs to the events if only events have it, else to the items; `item_id` and `member_id`
    belong to every file that has the column.
    """
    found: dict[str, dict[str, list[str]]] = {kind: {} for kind in KINDS}
    for entry in maps:
        name, equals, column = (part.strip() for part in entry.partition("="))
        kind, dot, plain = name.rpartition(".")
        if not equals or not plain or not column or (dot and kind not in KINDS):
            raise DataError(f"--map {entry!r} is not NAME=COLUMN (for example title=name, or events.item_id=sku)")
        if plain in COUNT_COLUMNS:
            raise DataError(f"--map {entry!r}: {plain!r} is a count, and counts come from the events alone; leave it out")
        kinds = [kind] if dot else _kinds_of(plain)
        holders = [each for each in kinds if each in tables and column in tables[each].columns]
        if not holders:
            seen = "; ".join(f"{tables[k].path.name}: {', '.join(tables[k].columns)}" for k in kinds if k in tables)
            raise DataError(f"--map {entry!r}: no column {column!r} ({seen or f'no file of {kinds[0]} was given'})")
        for each in holders:
            found[each].setdefault(plain, []).append(column)
    return found


def _kinds_of(name: str) -> list[str]:
    if name in SHARED:
        return list(SHARED[name])
    return ["events"] if name in EVENT_NAMES else ["items"]


def columns_of(table: Table, maps: Columns, names: Sequence[str]) -> dict[str, list[str]]:
    """NAME -> columns of this table: as mapped, else the column of the same name; names without a column are left out."""
    same = {column.lower(): column for column in table.columns}
    return {name: list(maps.get(name) or [same[name]]) for name in names if name in maps or name in same}


def joined(record: Mapping[str, str], columns: Sequence[str]) -> str:
    """The clean words of the columns, one after the other."""
    return " ".join(word for word in (clean(record[column]) for column in columns) if word)
