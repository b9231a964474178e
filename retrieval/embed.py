"""Tonight's items as vectors: only those that read differently since yesterday are encoded.

Most items of a night read as they did, and that is seen without writing a single prompt: a prompt is made of four texts and of
bucket words, and both are compared in columns. Only what is left is written and tokenised, once, and if the tokens differ too,
these are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from index.codes import Codes
from index.manifest import Manifest
from retrieval.catalog import Catalog
from retrieval.data.schema import Item
from retrieval.features import Quantizer
from retrieval.hysteresis import EXACT, Hysteresis, Mask, Numbers
from retrieval.tonight import Rows, Tonight
from retrieval.units import Here, UnitReader
from retrieval.yesterday import Opened

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

Vectors = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""(what is being done, done so far, of how many)"""
NO_VECTOR = np.zeros(0, np.float32)
NOTHING: Mapping[str, tuple[str, Vectors]] = {}
PROMPT_TEXTS = ("title", "category", "creator", "text")
"""What `retrieval.prompts.item_prompt` writes beside numbers."""


@dataclass(frozen=True)
class Embedded:
    """Vectors float32 [N,D], prompt digests [N] and the as-of numbers float64 [N] by name that the prompts were written with.

    `count` items were encoded anew, by the reader of units that `where` names.
    """

    vectors: Vectors
    digests: Sequence[str]
    numbers: Numbers
    count: int
    where: str


def embed_changed(
    tonight: Tonight,
    encoder: Encoder,
    previous: Opened | None,
    told: Progress,
    codes: Codes = "float32",
    made: Mapping[str, tuple[str, Vectors]] = NOTHING,
    hysteresis: Hysteresis = EXACT,
    reader: UnitReader | None = None,
) -> Embedded:
    """Tonight's items as vectors, before they are coded: yesterday's where the same encoder read the same prompt, else new.

    The same but for numbers that `hysteresis` lets pass, that is; whatever is written anew is written with tonight's numbers.
    Yesterday's will do if they are whole or in tonight's codes: coding them once more gives what coding new ones would. So will
    those that this encoder `made` by day, item id -> (prompt digest, vector). New ones are read in units by `reader`, which holds
    this encoder too; None: in this process.
    """
    from retrieval.encoder import row_digest

    total = len(tonight.items)
    vectors, digests = np.zeros((total, encoder.dims), np.float32), np.full(total, "", object)
    numbers = {name: column.copy() for name, column in tonight.numbers.items()}
    rows = np.full(total, -1, np.int64)
    if previous is not None and _usable(previous.snapshot.manifest, encoder.fingerprint, codes):
        rows = rows_of(previous.catalog, tonight.items.item_id)
        same = np.flatnonzero(rows >= 0)
        same = same[_reads_as(tonight, same, previous, rows[same], encoder.writer.quantizer, hysteresis)]
        vectors[same], digests[same] = previous.snapshot.vectors_at(rows[same]), _digests(previous, rows[same])
        for name in numbers.keys() & previous.numbers.keys():
            numbers[name][same] = previous.numbers[name][rows[same]]
    new = np.flatnonzero(digests == "")
    tokens = encoder.writer.items(*_written(tonight, new))
    digests[new] = [row_digest(read) for read in tokens]
    fresh = []
    for place, row in enumerate(new.tolist()):
        vector = _kept(previous, int(rows[row]), digests[row])
        if vector is None:
            vector = _made_by_day(made, tonight.items.item_id[row], digests[row], encoder.dims)
        if vector is None:
            fresh.append(place)
        else:
            vectors[row] = vector
    reader = reader or Here(encoder)
    if fresh:
        vectors[new[fresh]] = reader.embed([tokens[place] for place in fresh], lambda done, of: told("items", done, of))
    return Embedded(vectors, digests.tolist(), numbers, len(fresh), reader.where)


def rows_of(catalog: Catalog, ids: list[str]) -> Rows:
    """As `catalog.rows`. Most nights begin with yesterday's items in yesterday's order, which is seen at a tenth of the price."""
    held = catalog.columns.raw["item_id"]
    alike = min(len(held), len(ids))
    if not held.slice(0, alike).equals(pa.array(ids[:alike], pa.large_string())):
        return catalog.rows(ids)
    return np.concatenate([np.arange(alike, dtype=np.int64), catalog.rows(ids[alike:])])


def _usable(before: Manifest, fingerprint: str, codes: Codes) -> bool:
    return before.fingerprint == fingerprint and before.dtype in ("float32", codes)


def _reads_as(tonight: Tonight, items: Rows, previous: Opened, rows: Rows, quantizer: Quantizer, hysteresis: Hysteresis) -> Mask:
    """Bool [n]: which of tonight's `items` are written as yesterday's `rows` were, numbers as the policy sees them.

    False says nothing: the tokens may be the same nevertheless.
    """
    columns, shown = previous.catalog.columns, set(quantizer.names) & tonight.numbers.keys()
    if shown != set(quantizer.names) & previous.numbers.keys():
        return np.zeros(len(items), bool)
    texts, ours = pa.array(rows), tonight.items
    same = np.ones(len(items), bool)
    for name in PROMPT_TEXTS:
        words = pa.array(getattr(ours, name), pa.large_string()).take(pa.array(items))
        same &= pc.equal(columns.raw[name].take(texts), words).fill_null(False).to_numpy(zero_copy_only=False)
    then = {name: previous.numbers[name][rows] for name in shown}
    now = {name: tonight.numbers[name][items] for name in shown}
    same &= ~hysteresis.any_moved(quantizer, then, now, len(items))
    for name in set(quantizer.names) - now.keys():
        same &= ~EXACT.moved(quantizer, name, _static(columns.static, name, rows), _static(ours.numbers, name, items))
    return same


def _static(held: Mapping[str, npt.NDArray[np.float64]], name: str, rows: Rows) -> npt.NDArray[np.float64]:
    """A number of the items themselves, NaN throughout where nobody gives it."""
    return held[name][rows] if name in held else np.full(len(rows), np.nan)


def _digests(previous: Opened, rows: Rows) -> list[str]:
    found: list[str] = previous.catalog.columns.raw["digest"].take(pa.array(rows)).to_pylist()
    return found


def _written(tonight: Tonight, rows: Rows) -> tuple[list[Item], Numbers]:
    """Some of tonight's items as records, with their numbers."""
    return [tonight.items[row] for row in rows.tolist()], {name: column[rows] for name, column in tonight.numbers.items()}


def _kept(previous: Opened | None, row: int, digest: str) -> Vectors | None:
    """Yesterday's vector of a row (-1: it has none) if its tokens had this digest: words beyond the budget are not read."""
    if previous is None or row < 0 or previous.catalog.digest(row) != digest:
        return None
    return previous.snapshot.vectors_at(np.array([row]))[0]


def _made_by_day(made: Mapping[str, tuple[str, Vectors]], item_id: str, digest: str, dims: int) -> Vectors | None:
    """The vector of an item that was put in by day, if its tokens had this digest."""
    known, vector = made.get(item_id, ("", NO_VECTOR))
    return vector if known == digest and len(vector) == dims else None
