"""One pass over int8 codes: every product is compared with its query's bar while it is in the cache, few are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.certified_codes import BLOCK, Coded
from index.hits import Rows
from index.int8 import Bytes, Crew, Sums, Way, products

_PRODUCTS = 1 << 19
"""int32 products that one thread holds at a time for many queries: 2 MiB."""
_ROWS = 1 << 17
"""Rows at a time for few queries."""
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Survivors:
    """What came through a scan of Q queries: places in the codes and products there, those of query q at edges[q]:edges[q + 1].

    `crowded` [Q]: queries with more survivors than is worth keeping; they have none here.
    """

    places: Rows
    products: Sums
    edges: Rows
    crowded: Mask


def scan(coded: Coded, queries: Bytes, bars: Sums, most: int, crew: Crew, way: Way) -> Survivors:
    """Every place whose product with a query is above the bar [Q, B] of its block is returned, unless it has over `most`."""
    parts = crew.each(lambda blocks: _Share(coded, queries, bars, most, way).over(blocks), crew.shares(len(coded.scales)))
    asked, places, sums = (np.concatenate([part[name] for part in parts]) for name in range(3))
    crowded = np.logical_or.reduce([part[3] for part in parts]) | (np.bincount(asked, minlength=len(queries)) > most)
    if crowded.any():
        kept = ~crowded[asked]
        asked, places, sums = asked[kept], places[kept], sums[kept]
    if len(queries) > 1:
        order = np.argsort(asked, kind="stable")
        asked, places, sums = asked[order], places[order], sums[order]
    return Survivors(places, sums, np.searchsorted(asked, np.arange(len(queries) + 1)), crowded)


class _Share:
    """The part of one thread."""

    def __init__(self, coded: Coded, queries: Bytes, bars: Sums, most: int, way: Way) -> None:
        self._coded, self._queries, self._bars, self._way = coded, queries, bars.copy(), way
        self._most = most
        self._crowded: Mask = np.zeros(len(queries), bool)
        self._found: list[tuple[npt.NDArray[np.uint16], Rows, Sums]] = []

    def over(self, blocks: range) -> tuple[npt.NDArray[np.uint16], Rows, Sums, Mask]:
        """The survivors of these blocks as (query, place, product), and which queries were given up."""
        asked = len(self._queries)
        step = min(max(1, _PRODUCTS // (asked * BLOCK)), _ROWS // BLOCK, max(1, len(blocks)))
        sums, above = np.empty(asked * step * BLOCK, np.int32), np.empty(asked * step * BLOCK, bool)
        held = 0
        for first in range(blocks.start, blocks.stop, step):
            last = min(first + step, blocks.stop)
            width = (last - first) * BLOCK
            here, mask = sums[: asked * width].reshape(asked, width), above[: asked * width]
            products(self._queries, self._coded.codes[first * BLOCK : last * BLOCK], here, self._way)
            shape = (asked, last - first, BLOCK)
            np.greater(here.reshape(shape), self._bars[:, first:last, None], out=mask.reshape(shape))
            flat = np.flatnonzero(mask)
            query, place = np.divmod(flat, width)
            self._found.append((query.astype(np.uint16), place + first * BLOCK, here.ravel()[flat]))
            held += flat.size
            if held > asked * self._most:
                held = self._give_up()
        asking, places, products_ = self._together()
        return asking, places, products_, self._crowded

    def _together(self) -> tuple[npt.NDArray[np.uint16], Rows, Sums]:
        if not self._found:
            return np.zeros(0, np.uint16), np.zeros(0, np.int64), np.zeros(0, np.int32)
        first, second, third = (np.concatenate([part[name] for part in self._found]) for name in range(3))
        return first, second, third

    def _give_up(self) -> int:
        """Queries with too many survivors lose them and get no more; how many are held then."""
        asked, places, sums = self._together()
        self._crowded |= np.bincount(asked, minlength=len(self._queries)) > self._most
        self._bars[self._crowded] = np.iinfo(np.int32).max
        kept = ~self._crowded[asked]
        self._found = [(asked[kept], places[kept], sums[kept])]
        return int(kept.sum())
