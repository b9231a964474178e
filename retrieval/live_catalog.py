"""The catalogue of one moment: the night's rows and, behind them, the items put in since, in words, numbers and tokens.

The log keeps an item's record as bytes; what they mean is decided here. Numbers are those of the night: what happens to an item
during the day is counted when the day is over, for new items as for all others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from index.live_view import LiveView
from retrieval.attributes import Attribute
from retrieval.catalog import Catalog, Rows
from retrieval.data.schema import DAY, Item
from retrieval.parts import CatalogError
from retrieval.pooled_rate import POOLED

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

FORMAT = 1


class ItemTokens(Protocol):
    """What is needed of a ranker: the token ids of an item, and whose they are."""

    @property
    def fingerprint(self) -> str:
        """The ranker's fingerprint."""

    def item_tokens(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        """The token ids of N items with as-of numbers name -> float [N]."""


@dataclass(frozen=True)
class PutItem:
    """An item as it was put in at a time (seconds): `numbers` as of the night, `digest` of the prompt that was encoded.

    It has no facets: the contract gives an item put in by day no such words.
    """

    item: Item
    numbers: Mapping[str, float]
    digest: str
    at: int

    def to_bytes(self) -> bytes:
        """The record as the log keeps it; `parse` reads it back."""
        item = self.item
        words = [item.item_id, item.title, item.text, item.category, item.creator]
        known = {name: value for name, value in self.numbers.items() if not math.isnan(value)}
        fields = {"format": FORMAT, "words": words, "created_at": item.created_at, "static": dict(item.numbers)}
        return json.dumps({**fields, "numbers": known, "digest": self.digest, "at": self.at}, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, record: bytes) -> PutItem:
        """The record that was kept. Raises CatalogError."""
        try:
            found = json.loads(record)
            if found["format"] != FORMAT:
                raise CatalogError(f"an item of the log is of format {found['format']}, expected {FORMAT}; put it in again")
            item_id, title, text, category, creator = found["words"]
            item = Item(item_id, title, text, category, creator, found["created_at"], dict(found["static"]))
            return cls(item, dict(found["numbers"]), str(found["digest"]), int(found["at"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CatalogError(f"an item of the log cannot be read ({type(error).__name__}: {error}); put it in again") from error


class LiveItems:
    """The live items of one snapshot, each read once: a live row never changes. For one thread at a time."""

    def __init__(self, ranker: ItemTokens | None = None) -> None:
        self.ranker = ranker
        self._read: dict[int, PutItem] = {}
        self._tokens: dict[int, npt.NDArray[np.int32]] = {}

    def item(self, view: LiveView, row: int) -> PutItem:
        """What stands in a live row."""
        if row not in self._read:
            self._read[row] = PutItem.parse(view.record(row) or b"")
        return self._read[row]

    def tokens(self, view: LiveView, rows: Sequence[int], names: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ranker's tokens of live rows; `names` are those of the as-of numbers."""
        new = [row for row in dict.fromkeys(rows) if row not in self._tokens]
        if new and self.ranker is not None:
            put = [self.item(view, row) for row in new]
            made = self.ranker.item_tokens([one.item for one in put], number_columns([one.numbers for one in put], names))
            self._tokens.update({row: np.array(ids, np.int32) for row, ids in zip(new, made, strict=True)})
        return [self._tokens[row] for row in rows]


class LiveCatalog(Catalog):
    """A catalogue whose rows are a moment's: those of the night first, then the live ones. Never changes.

    A row of the night that was replaced or withdrawn still has its words; `rows` does not lead there any more.
    """

    def __init__(self, night: Catalog, view: LiveView, items: LiveItems) -> None:
        super().__init__(night.columns)
        self._view, self._items = view, items
        self._live_attributes: dict[str, Attribute] = {}

    def __len__(self) -> int:
        return self._view.items

    def item(self, row: int) -> Item:
        """See Catalog."""
        live = self._live(row)
        return super().item(row) if live is None else live.item

    def title(self, row: int) -> str:
        """See Catalog."""
        live = self._live(row)
        return super().title(row) if live is None else live.item.title

    def words(self, name: str, rows: Sequence[int] | Rows) -> list[str]:
        """See Catalog."""
        column = self.columns.text[name]
        found = [(row, self._live(row)) for row in np.asarray(rows, np.int64).tolist()]
        return [column[row] if live is None else getattr(live.item, name) for row, live in found]

    def numbers(self, row: int) -> dict[str, float]:
        """See Catalog."""
        live = self._live(row)
        return super().numbers(row) if live is None else {name: live.numbers.get(name, math.nan) for name in self.as_of_names}

    def columns_of(self, rows: Rows, as_of: Sequence[str], static: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
        """See Catalog."""
        night = rows < self._first
        found = {name: np.full(len(rows), math.nan) for name in (*as_of, *static)}
        for name, column in super().columns_of(rows[night], as_of, static).items():
            found[name][night] = column
        for place in np.flatnonzero(~night).tolist():
            live = self._items.item(self._view, int(rows[place]))
            for names, numbers in ((as_of, live.numbers), (static, live.item.numbers)):
                for name in names:
                    found[name][place] = numbers.get(name, math.nan)
        return found

    def digest(self, row: int) -> str:
        """See Catalog."""
        live = self._live(row)
        return super().digest(row) if live is None else live.digest

    def ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """See Catalog."""
        return self._view.ids(rows)

    def rows(self, ids: Sequence[str]) -> Rows:
        """See Catalog; -1 for an item that was withdrawn, too."""
        return self._view.rows(ids)

    def tokens(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> list[npt.NDArray[np.int32]]:
        """See Catalog."""
        asked = np.asarray(rows, np.int64)
        if not (asked >= self._view.first_live).any():
            return super().tokens(asked)
        older = iter(super().tokens(asked[asked < self._view.first_live]))
        newer = iter(self._items.tokens(self._view, asked[asked >= self._view.first_live].tolist(), self.as_of_names))
        return [next(older) if row < self._view.first_live else next(newer) for row in asked.tolist()]

    def live_attribute(self, name: str) -> Attribute:
        """The column over the live rows [n] that `attribute` is over the night's; unknown where items have no such word."""
        if name not in self._live_attributes:
            items = [self._items.item(self._view, row).item for row in range(self._view.first_live, self._view.count)]
            values = [{"category": item.category, "creator": item.creator}.get(name, "") for item in items]
            self._live_attributes[name] = Attribute.of(values)
        return self._live_attributes[name]

    @cached_property
    def _first(self) -> int:
        return self._view.first_live

    def _live(self, row: int) -> PutItem | None:
        return self._items.item(self._view, row) if row >= self._first else None


def put_items(
    catalog: LiveCatalog, encoder: Encoder, items: Sequence[Item], at: int
) -> tuple[list[PutItem], npt.NDArray[np.float32]]:
    """The items as they are to be put in at a time (seconds), and their vectors float32 [n, D], of one encoding.

    An item that the night knows keeps its as-of numbers; a new one has been met by nobody.
    """
    rows = catalog.rows([item.item_id for item in items]).tolist()
    numbers = [
        catalog.numbers(row) if row >= 0 else _unmet(item, catalog.as_of, catalog.as_of_names) for row, item in zip(rows, items)
    ]
    columns = number_columns(numbers, catalog.as_of_names)
    digests = encoder.item_digests(items, columns)
    put = [PutItem(item, own, digest, at) for item, own, digest in zip(items, numbers, digests)]
    return put, encoder.items(items, columns)


def number_columns(numbers: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    """Name -> float64 [n] of the numbers of n items; NaN = unknown."""
    return {name: np.array([one.get(name, math.nan) for one in numbers], np.float64) for name in names}


def _unmet(item: Item, as_of: int, names: Sequence[str]) -> dict[str, float]:
    """What the event log says at a time of an item that it does not name; its pooled rate waits for the night."""
    age = math.nan if item.created_at is None else float(as_of // DAY - item.created_at // DAY)
    known = {"positive_rate": math.nan, POOLED: math.nan, "age_days": age if age >= 0 else math.nan}
    return {name: known.get(name, 0.0) for name in names}
