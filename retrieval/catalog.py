"""The words beside the vectors: item records and ranker tokens as parts of a snapshot, row-aligned and memory-mapped.

A snapshot's rows are numbers; whoever ranks, shows or describes them needs their words, and needs those of the same day.
So the night writes them into the snapshot as two opaque parts (`retrieval.parts`):

  `catalog.arrow`  item_id, title, text, category, creator, language and region where the data have them, created_at,
                   `static:NAME` (numbers of the data), `asof:NAME` (numbers from the event log at the night's time), digest
                   (of the encoder's prompt tokens)
  `tokens.arrow`   the ranker's token ids of each item, with the fingerprint of the ranker that made them.

Opening maps the files and reads nothing; a row costs microseconds. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from index.errors import BrewlineError
from index.ids import Ids
from index.snapshot import Snapshot
from retrieval.attributes import ATTRIBUTES, Attribute, UnknownAttribute
from retrieval.data.schema import FACETS, MISSING_TIME, Item, Items
from retrieval.fingerprint import FingerprintMismatch
from retrieval.parts import CatalogError, map_part, part_bytes, part_facts

CATALOG_PART = "catalog.arrow"
TOKENS_PART = "tokens.arrow"
WORDS = ("item_id", "title", "text", "category", "creator")
STATIC, AS_OF = "static:", "asof:"

Rows = npt.NDArray[np.int64]
COLUMNS = {
    CATALOG_PART: dict.fromkeys((*WORDS, "digest"), pa.large_string()) | {"created_at": pa.int64()},
    TOKENS_PART: {"tokens": pa.large_list(pa.int32())},
}
"""What each part must hold, beside the `static:` and `asof:` numbers and the facets."""


class UnknownItem(BrewlineError):
    """An id that the snapshot's catalogue does not hold."""


class Texts:
    """A text column, mapped. A look-up through Arrow's own objects takes ten times as long."""

    def __init__(self, column: pa.Array) -> None:
        _, bounds, text = column.buffers()
        self._bounds, self._text = memoryview(bounds or b"").cast("q"), memoryview(text or b"")

    def __getitem__(self, row: int) -> str:
        return str(self._text[self._bounds[row] : self._bounds[row + 1]], "utf-8")


class Columns:
    """The mapped columns of one snapshot's parts, shared by every catalogue over them."""

    def __init__(self, ids: Ids, records: pa.RecordBatch, tokens: pa.RecordBatch | None) -> None:
        self.ids = ids
        self.raw = {name: records.column(index) for index, name in enumerate(records.schema.names)}
        self.text = {name: Texts(self.raw[name]) for name in (*WORDS, "digest")}
        self.facets = {name: Texts(self.raw[name]) for name in FACETS if name in self.raw}
        self.static, self.numbers = _numbers(self.raw, STATIC), _numbers(self.raw, AS_OF)
        self.as_of = int(str(part_facts(records, CATALOG_PART, COLUMNS[CATALOG_PART])["as_of"]))
        self.tokens_of = ""
        if tokens is not None:
            self.tokens_of = str(part_facts(tokens, TOKENS_PART, COLUMNS[TOKENS_PART])["ranker"])
            self.starts, self.tokens = tokens.column(0).offsets.to_numpy(), tokens.column(0).values.to_numpy()
        self.attributes: dict[str, Attribute] = {}


def _numbers(raw: Mapping[str, pa.Array], kind: str) -> dict[str, npt.NDArray[np.float64]]:
    named = {name.removeprefix(kind): column for name, column in raw.items() if name.startswith(kind)}
    return {name: column.to_numpy(zero_copy_only=False) for name, column in named.items()}


class Catalog:
    """The item records of one snapshot. Rows are the snapshot's; an unknown id has row -1.

    `as_of` is the time (seconds) up to which the night knew the world; `tokens_of` is the fingerprint of the ranker whose
    tokens are here, or "" if the night had no ranker; `static` and `as_of_names` name the numbers of an item.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.as_of, self.tokens_of = columns.as_of, columns.tokens_of
        self.static, self.as_of_names = tuple(columns.static), tuple(columns.numbers)

    @classmethod
    def open(cls, snapshot: Snapshot) -> Catalog:
        """The catalogue of a snapshot, mapped. Raises CatalogError if the snapshot has none or it does not fit the vectors."""
        names = snapshot.parts
        if CATALOG_PART not in names:
            raise CatalogError(f"snapshot {snapshot.name} has no part {CATALOG_PART}; write it with `brewline nightly`")
        records = map_part(snapshot.part(CATALOG_PART))
        tokens = map_part(snapshot.part(TOKENS_PART)) if TOKENS_PART in names else None
        for part, batch in ((CATALOG_PART, records), (TOKENS_PART, tokens)):
            if batch is None:
                continue
            facets = {name: pa.large_string() for name in FACETS if name in batch.schema.names}
            part_facts(batch, part, COLUMNS[part] | facets)
            if batch.num_rows != len(snapshot.ids):
                raise CatalogError(
                    f"snapshot {snapshot.name} holds {len(snapshot.ids):,} vectors but {part} holds {batch.num_rows:,} rows; "
                    "publish a new night or roll back"
                )
        return Catalog(Columns(snapshot.ids, records, tokens))

    def __len__(self) -> int:
        return len(self.columns.ids)

    def item(self, row: int) -> Item:
        """The record of a row, equal to the one that the night read."""
        item_id, title, text, category, creator = (self.columns.text[name][row] for name in WORDS)
        numbers = {name: float(column[row]) for name, column in self.columns.static.items()}
        known = {name: value for name, value in numbers.items() if value == value}
        facets = {name: word for name, column in self.columns.facets.items() if (word := column[row])}
        return Item(item_id, title, text, category, creator, self.columns.raw["created_at"][row].as_py(), known, facets)

    def title(self, row: int) -> str:
        """The title of a row, without reading the rest of the record."""
        return self.columns.text["title"][row]

    def words(self, name: str, rows: Sequence[int] | Rows) -> list[str]:
        """One of WORDS of rows, in order, without reading the rest of the records; "" where unknown."""
        column = self.columns.text[name]
        return [column[row] for row in np.asarray(rows, np.int64).tolist()]

    def numbers(self, row: int) -> dict[str, float]:
        """The numbers of a row as of the night; NaN = unknown. Its vector may be of older ones (`retrieval.hysteresis`)."""
        return {name: float(column[row]) for name, column in self.columns.numbers.items()}

    def columns_of(self, rows: Rows, as_of: Sequence[str], static: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
        """Float64 [n] by name of n rows: numbers `as_of` the night, which it must have, and `static` ones; NaN = unknown."""
        own = self.columns.static
        found = {name: self.columns.numbers[name][rows] for name in as_of}
        return found | {name: own[name][rows] if name in own else np.full(len(rows), np.nan) for name in static}

    def digest(self, row: int) -> str:
        """The encoder's digest of the row's prompt tokens: equal digests mean an equal vector."""
        return self.columns.text["digest"][row]

    def ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """The ids of rows, in order."""
        return self.columns.ids.many(rows)

    def rows(self, ids: Sequence[str]) -> Rows:
        """int64 [n]: the row of each id, -1 where the catalogue does not hold it."""
        return self.columns.ids.rows(ids)

    def row(self, item_id: str) -> int:
        """The row of one id. Raises UnknownItem."""
        found = int(self.rows([item_id])[0])
        if found < 0:
            raise UnknownItem(
                f"item {item_id[:80]!r} is not in the catalogue of {len(self):,} items; check the id or the snapshot"
            )
        return found

    def attribute(self, name: str) -> Attribute:
        """A column of words to choose the snapshot's rows by ("category", "creator", "language"), read at the first question.

        Raises UnknownAttribute for a column that the catalogue does not have: nobody could say what it lets through.
        """
        if name not in self.columns.attributes:
            column = self.columns.raw.get(name)
            if column is None or column.type != pa.large_string():
                known = ", ".join((*ATTRIBUTES, *self.columns.facets))
                raise UnknownAttribute(
                    f"the catalogue has no column {name!r} to filter by; it has {known}: "
                    "leave the condition out, or publish a night of data with that column"
                )
            coded = column.dictionary_encode()
            self.columns.attributes[name] = Attribute(coded.indices.fill_null(-1).to_numpy(), coded.dictionary.to_pylist())
        return self.columns.attributes[name]

    def tokens(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> list[npt.NDArray[np.int32]]:
        """int32 [T] for each row: the ranker's tokens of the item, mapped (no copy). Raises CatalogError if there are none."""
        if not self.tokens_of:
            raise CatalogError("this snapshot was published without a ranker; run `brewline nightly` with --ranker DIR")
        starts, tokens = self.columns.starts, self.columns.tokens
        return [tokens[starts[row] : starts[row + 1]] for row in np.asarray(rows, np.int64).tolist()]

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
    lengths = {len(items), len(digests), *map(len, numbers.values()), *map(len, items.facets.values())}
    if len(lengths) != 1:
        raise CatalogError(f"the catalogue's columns must be of one length, not {sorted(lengths)}")
    if len(items.row_of) != len(items):
        raise CatalogError(f"{len(items) - len(items.row_of):,} item ids come more than once; ids must be unique")
    created = pa.array(items.created_at, pa.int64(), mask=items.created_at == MISSING_TIME)
    columns: dict[str, pa.Array] = {name: pa.array(getattr(items, name), pa.large_string()) for name in WORDS}
    columns |= {name: pa.array(column, pa.large_string()) for name, column in items.facets.items()}
    columns["created_at"] = created
    columns |= {f"{STATIC}{name}": pa.array(column, pa.float64()) for name, column in items.numbers.items()}
    columns |= {f"{AS_OF}{name}": pa.array(column, pa.float64()) for name, column in numbers.items()}
    columns["digest"] = pa.array(digests, pa.large_string())
    return part_bytes(pa.record_batch(columns), CATALOG_PART, {"as_of": as_of})


def write_tokens(tokens: Sequence[Sequence[int]], ranker: str) -> bytes:
    """The bytes of `tokens.arrow`: one list of token ids per row, under the ranker's fingerprint."""
    column = pa.array(tokens, pa.large_list(pa.int32()))
    return part_bytes(pa.record_batch({"tokens": column}), TOKENS_PART, {"ranker": ranker})
