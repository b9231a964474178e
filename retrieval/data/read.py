"""A data folder becomes a `Dataset`; what does not fit is refused row by row, with file, row and reason.

Two kinds of wrong are kept apart. A row that does not fit is left out and recorded (`Refusal`). A folder that cannot be
understood (no items.parquet, truncated Parquet, wrong column type, cuts in the wrong order, nothing valid left) raises
`DataError`: half a data set read in silence would train a model on it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.data.columns import Sheet, is_number, is_text
from retrieval.data.events import read_events
from retrieval.data.meta import LATEST_TIME, no_events, read_meta, uncounted, unordered
from retrieval.data.refusals import Refusal, Refusals
from retrieval.data.schema import (
    COUNT_COLUMNS,
    FACETS,
    MISSING_TIME,
    Connections,
    DataError,
    Dataset,
    Items,
    Members,
)

__all__ = ["Refusal", "Refusals", "read_dataset", "read_dataset_report"]

ITEM_TEXTS = ("title", "text", "category", "creator")
ITEM_COLUMNS = frozenset(("item_id", *ITEM_TEXTS, "created_at"))
EARLIEST_TIME = -62_135_596_800
"""The year 1: a film may be older than 1970, nothing is older than the calendar."""
MOST_REASONS_LOGGED = 5

log = logging.getLogger(__name__)


def read_dataset(folder: Path) -> Dataset:
    """The folder's data set is in memory; refused rows are left out and summed up in one warning of the log, and a log of which
    nothing counts as an engagement is told in another.

    Raises DataError if the folder is malformed. `read_dataset_report` hands the refused rows over one by one.
    """
    dataset, refusals = read_dataset_report(folder)
    if len(refusals):
        counts = list(refusals.counts().items())
        shown = "; ".join(f"{reason} ({count:,})" for reason, count in counts[:MOST_REASONS_LOGGED])
        more = f"; and {len(counts) - MOST_REASONS_LOGGED} more reasons" if len(counts) > MOST_REASONS_LOGGED else ""
        log.warning("%s: %s rows refused: %s%s (first: %s)", folder, f"{len(refusals):,}", shown, more, refusals[0])
    if why := uncounted(dataset):
        log.warning("%s: %s", folder, why)
    return dataset


def read_dataset_report(folder: Path) -> tuple[Dataset, Refusals]:
    """The folder's data set and every refused row. Raises DataError if the folder is malformed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with items.parquet and dataset.json (docs/data.md)")
    refusals = Refusals()
    has_events = (folder / "interactions.parquet").exists()
    meta = read_meta(folder, has_events)
    items = _read_items(folder / "items.parquet", refusals)
    members = _read_members(folder / "members.parquet", refusals)
    events = no_events()
    if has_events:
        events, members = read_events(folder / "interactions.parquet", meta, items, members, refusals)
    path = folder / "connections.parquet"
    connections = _read_connections(path, members, refusals) if path.exists() else None
    dataset = Dataset(meta, items, members, events, connections)
    return (unordered(dataset) if meta.order == "none" else dataset), refusals


def _read_items(path: Path, refusals: Refusals) -> Items:
    sheet = Sheet(path, refusals, required=("item_id",), optional=None)
    codes, words = sheet.codes("item_id", needed=True)
    facets = [name for name in FACETS if name in sheet and is_text(sheet.table.column(name).type)]
    texts = {name: sheet.texts(name) for name in (*ITEM_TEXTS, *facets)}
    created, unknown = sheet.whole("created_at", needed=False)
    absurd = ~unknown & ((created < EARLIEST_TIME) | (created > LATEST_TIME))
    sheet.refuse(absurd, "created_at is not a time in seconds between the years 1 and 2100", created)
    numbers = {name: sheet.numbers(name) for name in _number_columns(sheet, ITEM_COLUMNS)}
    refuse_repeated(sheet, codes, "duplicate item_id", words)
    kept = np.flatnonzero(sheet.ok)
    if not len(kept):
        raise DataError(f"{path}: no valid item is left of {len(sheet):,} rows; {refusals.mostly(path.name)}")
    created = np.where(unknown, MISSING_TIME, created)[kept]
    ids = words.take(codes[kept]).to_pylist()
    columns = {name: [column[row] for row in kept] for name, column in texts.items()}
    chosen = {name: words for name in facets if any(words := columns.pop(name))}
    return Items(ids, created_at=created, numbers={name: n[kept] for name, n in numbers.items()}, facets=chosen, **columns)


def _read_members(path: Path, refusals: Refusals) -> Members:
    if not path.exists():
        return Members([])
    sheet = Sheet(path, refusals, required=("member_id",), optional=None)
    codes, words = sheet.codes("member_id", needed=True)
    fields = [n for n in sheet.table.column_names if n != "member_id" and is_text(sheet.type_of(n))]
    profile = {name: sheet.texts(name) for name in fields}
    numbers = {name: sheet.numbers(name) for name in _number_columns(sheet, frozenset(("member_id",)))}
    refuse_repeated(sheet, codes, "duplicate member_id", words)
    kept = np.flatnonzero(sheet.ok)
    return Members(
        words.take(codes[kept]).to_pylist(),
        {name: [column[row] for row in kept] for name, column in profile.items()},
        {name: column[kept] for name, column in numbers.items()},
    )


def _read_connections(path: Path, members: Members, refusals: Refusals) -> Connections:
    sheet = Sheet(path, refusals, required=("member_id", "other_id", "kind"), optional=("since",))
    member, member_words = sheet.codes("member_id", needed=True)
    other, other_words = sheet.codes("other_id", needed=True)
    kind, kind_words = sheet.codes("kind", needed=True)
    since, unknown = sheet.whole("since", needed=False)
    absurd = ~unknown & ((since < EARLIEST_TIME) | (since > LATEST_TIME))
    sheet.refuse(absurd, "since is not a time in seconds between the years 1 and 2100", since)
    rows = np.array([members.row_of.get(word, -1) for word in member_words.to_pylist()] + [-1], np.int32)
    sheet.refuse(rows[member] < 0, "connection of an unknown member_id", sheet.table.column("member_id"))
    kept = np.flatnonzero(sheet.ok)
    return Connections(
        rows[member][kept],
        other_words.take(other[kept]).to_pylist(),
        kind_words.take(kind[kept]).to_pylist(),
        np.where(unknown, MISSING_TIME, since)[kept],
    )


def refuse_repeated(sheet: Sheet, codes: npt.NDArray[np.int32], reason: str, words: pa.Array) -> None:
    """Of the good rows that share a code, all but the first are refused."""
    good = np.flatnonzero(sheet.ok)
    first = np.full(int(codes.max(initial=-1)) + 1, -1, np.int64)
    first[codes[good][::-1]] = good[::-1]
    repeated = np.zeros(len(sheet), bool)
    repeated[good] = first[codes[good]] != good
    if repeated.any():
        sheet.refuse(repeated, reason, words.take(pa.array(np.maximum(codes, 0))))


def _number_columns(sheet: Sheet, taken: frozenset[str]) -> list[str]:
    names = [name for name in sheet.table.column_names if name not in taken and name not in COUNT_COLUMNS]
    return [name for name in names if is_number(sheet.type_of(name))]
