"""The words beside the vectors: item records and ranker tokens as parts of a snapshot, row-aligned and memory-mapped.

A snapshot's rows are numbers; whoever ranks, shows or describes them needs their words, and needs those of the same day.
So the night writes them into the snapshot as two opaque parts in Arrow's file format, one record batch each:

  `catalog.arrow`  item_id, title, text, category, creator, created_at, `static:NAME` (numbers of the data), `asof:NAME`
                   (numbers from the event log at the night's time), digest (of the encoder's prompt tokens)
  `tokens.arrow`   the ranker's token ids of each item, with the fingerprint of the ranker that made them.

Opening maps the files and reads nothing; a row costs microseconds. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from index.errors import BrewlineError
from index.ids import Ids
from index.snapshot import Snapshot
from retrieval.data.schema import MISSING_TIME, Item, Items
from retrieval.fingerprint import FingerprintMismatch

CATALOG_PART = "catalog.arrow"
TOKENS_PART = "tokens.arrow"
FORMAT = 1
WORDS = ("item_id", "title", "text", "category", "creator")
STATIC, AS_OF = "static:", "asof:"

Rows = npt.NDArray[np.int64]
COLUMNS = {
    CATALOG_PART: dict.fromkeys((*WORDS, "digest"), pa.large_string()) | {"created_at": pa.int64()},
    TOKENS_PART: {"tokens": pa.large_list(pa.int32())},
}
"""What each part must hold, beside the `static:` and `asof:` numbers."""


class CatalogError(BrewlineError):
    """A catalogue part is missing, damaged, of another format or of another ranker."""


class UnknownItem(BrewlineError):
    """An id that the snapshot's catalogue does not hold."""


class Catalog:
    """The item records of one snapshot. Rows are the snapshot's; an unknown id has row -1.

    `as_of` is the time (seconds) up to which the night knew the world; `tokens_of` is the fingerprint of the ranker whose
    tokens are here, or "" if the night had no ranker.
    """

    def __init__(self, ids: Ids, records: pa.RecordBatch, tokens: pa.RecordBatch | None) -> None:
        self._ids = ids
        self._column = {name: records.column(index) for index, name in enumerate(records.schema.names)}
        self._static = [name for name in self._column if name.startswith(STATIC)]
        self._as_of = [name for name in self._column if name.startswith(AS_OF)]
        self.as_of = int(str(_facts(records, CATALOG_PART)["as_of"]))
        self.tokens_of = ""
        if tokens is not None:
            self.tokens_of = str(_facts(tokens, TOKENS_PART)["ranker"])
            self._starts = tokens.column(0).offsets.to_numpy()
            self._tokens = tokens.column(0).values.to_numpy()

    @classmethod
    def open(cls, snapshot: Snapshot) -> Catalog:
        """The catalogue of a snapshot, mapped. Raises CatalogError if the snapshot has none or it does not fit the vectors."""
        names = snapshot.parts
        if CATALOG_PART not in names:
            raise CatalogError(f"snapshot {snapshot.name} has no part {CATALOG_PART}; write it with `brewline nightly`")
        records = _map(snapshot.part(CATALOG_PART))
        tokens = _map(snapshot.part(TOKENS_PART)) if TOKENS_PART in names else None
        for part, batch in ((CATALOG_PART, records), (TOKENS_PART, tokens)):
            if batch is None:
                continue
            _facts(batch, part)
            if batch.num_rows != len(snapshot.ids):
                raise CatalogError(
                    f"snapshot {snapshot.name} holds {len(snapshot.ids):,} vectors but {part} holds {batch.num_rows:,} rows; "
                    "publish a new night or roll back"
                )
        return cls(snapshot.ids, records, tokens)

    def __len__(self) -> int:
        return len(self._ids)

    def item(self, row: int) -> Item:
        """The record of a row, equal to the one that the night read."""
        item_id, title, text, category, creator = (str(self._column[name][row].as_py()) for name in WORDS)
        numbers = {name.removeprefix(STATIC): self._column[name][row].as_py() for name in self._static}
        known = {name: value for name, value in numbers.items() if value == value}
        return Item(item_id, title, text, category, creator, self._column["created_at"][row].as_py(), known)

    def title(self, row: int) -> str:
        """The title of a row, without reading the rest of the record."""
        return str(self._column["title"][row].as_py())

    def creators(self, rows: Sequence[int] | Rows) -> list[str]:
        """The creators of rows, in order; "" where unknown."""
        taken = self._column["creator"].take(pa.array(np.asarray(rows, np.int64)))
        return list(taken.to_pylist())

    def numbers(self, row: int) -> dict[str, float]:
        """The as-of numbers of a row by name; NaN = unknown. The ones its prompt was written with."""
        return {name.removeprefix(AS_OF): self._column[name][row].as_py() for name in self._as_of}

    def digest(self, row: int) -> str:
        """The encoder's digest of the row's prompt tokens: equal digests mean an equal vector."""
        return str(self._column["digest"][row].as_py())

    def ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """The ids of rows, in order."""
        return self._ids.many(rows)

    def rows(self, ids: Sequence[str]) -> Rows:
        """int64 [n]: the row of each id, -1 where the catalogue does not hold it."""
        return self._ids.rows(ids)

    def row(self, item_id: str) -> int:
        """The row of one id. Raises UnknownItem."""
        found = int(self.rows([item_id])[0])
        if found < 0:
            raise UnknownItem(
                f"item {item_id[:80]!r} is not in the catalogue of {len(self):,} items; check the id or the snapshot"
            )
        return found

    def tokens(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> list[npt.NDArray[np.int32]]:
        """int32 [T] for each row: the ranker's tokens of the item, mapped (no copy). Raises CatalogError if there are none."""
        if not self.tokens_of:
            raise CatalogError("this snapshot was published without a ranker; run `brewline nightly` with --ranker DIR")
        starts = self._starts
        return [self._tokens[starts[row] : starts[row + 1]] for row in np.asarray(rows, np.int64).tolist()]

    def require_ranker(self, fingerprint: str) -> None:
        """Nothing happens if the tokens are of this ranker. Raises FingerprintMismatch with both values otherwise."""
        if self.tokens_of != fingerprint:
            raise FingerprintMismatch(
                "the ranker given does not fit the item tokens of the snapshot",
                fingerprint,
                self.tokens_of or "none (the snapshot was published without a ranker)",
                "serve with the ranker of the snapshot, or run `brewline nightly` with --ranker of this one",
            )


def write_catalog(items: Items, numbers: Mapping[str, npt.NDArray[np.float64]], digests: Sequence[str], as_of: int) -> bytes:
    """The bytes of `catalog.arrow` for items in the rows' order. `numbers` float64 [N] each, as of `as_of` (seconds).

    The same input gives the same bytes. Raises CatalogError if lengths differ or an id comes twice.
    """
    lengths = {len(items), len(digests), *(len(column) for column in numbers.values())}
    if len(lengths) != 1:
        raise CatalogError(f"the catalogue's columns must be of one length, not {sorted(lengths)}")
    if len(items.row_of) != len(items):
        raise CatalogError(f"{len(items) - len(items.row_of):,} item ids come more than once; ids must be unique")
    created = pa.array(items.created_at, pa.int64(), mask=items.created_at == MISSING_TIME)
    columns: dict[str, pa.Array] = {name: pa.array(getattr(items, name), pa.large_string()) for name in WORDS}
    columns["created_at"] = created
    columns |= {f"{STATIC}{name}": pa.array(column, pa.float64()) for name, column in items.numbers.items()}
    columns |= {f"{AS_OF}{name}": pa.array(column, pa.float64()) for name, column in numbers.items()}
    columns["digest"] = pa.array(digests, pa.large_string())
    return _ipc(pa.record_batch(columns), {"part": CATALOG_PART, "as_of": as_of})


def write_tokens(tokens: Sequence[Sequence[int]], ranker: str) -> bytes:
    """The bytes of `tokens.arrow`: one list of token ids per row, under the ranker's fingerprint."""
    column = pa.array(tokens, pa.large_list(pa.int32()))
    return _ipc(pa.record_batch({"tokens": column}), {"part": TOKENS_PART, "ranker": ranker})


def _ipc(batch: pa.RecordBatch, facts: Mapping[str, object]) -> bytes:
    schema = batch.schema.with_metadata({"brewline": json.dumps({"format": FORMAT, **facts}, sort_keys=True)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return bytes(sink.getvalue().to_pybytes())


def _map(path: Path) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise CatalogError(f"{path.name} holds {reader.num_record_batches} record batches instead of 1")
        return reader.get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise CatalogError(f"{path.name} cannot be read ({error}); publish a new night or roll back") from error


def _facts(batch: pa.RecordBatch, part: str) -> dict[str, object]:
    """What a part says about itself, once it is of this format and its columns are there. Raises CatalogError."""
    try:
        found = json.loads((batch.schema.metadata or {}).get(b"brewline", b"{}"))
        kind = (found["part"], found["format"])
    except (ValueError, KeyError, TypeError):
        found, kind = {}, ("nothing", "unknown")
    if kind != (part, FORMAT):
        raise CatalogError(f"{part} says it is {kind[0]} of format {kind[1]}, expected format {FORMAT}; publish a new night")
    types = dict(zip(batch.schema.names, batch.schema.types))
    wrong = [name for name, kind in COLUMNS[part].items() if types.get(name) != kind]
    if wrong:
        raise CatalogError(f"{part} has no column {', '.join(wrong)} of the right type; publish a new night")
    return dict(found)
