"""A first stage that answers several members in one search, and that shows the lists it merges. No gRPC here.

`Wide` is a `Retriever` of the same parts: what it asks of the index, the filters and the lists is what `retrieve` asks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from index.filters import RowSet
from index.hits import Rows
from retrieval.attributes import Wanted
from retrieval.data.schema import MemberView
from retrieval.hybrid import LISTED
from retrieval.retrieve import Candidates, Retriever, Vector, distinct, seen_items


@dataclass(frozen=True)
class Scope:
    """What may come back for one member: `unwanted` rows rising, and the allowed ones of the night and of today (None: all)."""

    view: MemberView
    unwanted: Rows
    allow: RowSet | None
    allow_live: RowSet | None


@dataclass(frozen=True)
class Listed:
    """One list of the first stage, best first; `weight` is its own among those that are merged, None where nothing is."""

    name: str
    rows: Rows
    weight: float | None = None


class Wide(Retriever):
    """A retriever for many questions of one moment, and for questions about a question."""

    @classmethod
    def over(cls, one: Retriever) -> Self:
        """The same encoder, moment and lists."""
        return cls(one.encoder, one.moment, one.catalog, one.hybrid)

    def scope(self, view: MemberView, exclude: Collection[str], wanted: Wanted) -> Scope:
        """What may come back: neither `exclude` nor the history, only what is `wanted`. Raises UnknownAttribute."""
        unwanted = self.excluded_rows(distinct(list(exclude), seen_items(view)))
        return Scope(view, unwanted, *self._allowed(wanted, view.connections))

    def lets_through(self, scope: Scope, row: int) -> bool:
        """Whether the filter alone lets a row through; what is unwanted is not looked at."""
        if scope.allow is None or scope.allow_live is None:
            return True
        first = self.moment.first_live
        allowed, place = (scope.allow, row) if row < first else (scope.allow_live, row - first)
        return bool(allowed.has(np.array([place]))[0])

    def retrieve_many(self, vectors: npt.NDArray[np.float32], k: int, scopes: Sequence[Scope]) -> list[Candidates]:
        """The `k` best items for each vector [Q, D] within its scope, as `retrieve` finds them, by one search of the index.

        Raises ExclusionFailed rather than return an item that must not be answered.
        """
        dense = zip(*self._searched(vectors, k, scopes), scopes, strict=True)
        return [self._answer(rows, scores, k, one.view, one.unwanted, one.allow, one.allow_live) for rows, scores, one in dense]

    def lists(self, vector: Vector, k: int, scope: Scope) -> list[Listed]:
        """The lists that an answer of `k` candidates is made of, the dense one first."""
        dense = self._searched(vector[None, :], k, [scope])[0][0]
        if self.hybrid is None:
            return [Listed("dense", dense)]
        excluded = self._forbidden(scope.unwanted, scope.allow)
        return [Listed(*one) for one in self.hybrid.lists(dense, scope.view, excluded, k)]

    def _searched(
        self, vectors: npt.NDArray[np.float32], k: int, scopes: Sequence[Scope]
    ) -> tuple[list[Rows], list[npt.NDArray[np.float32]]]:
        """The dense list of each vector, as deep as an answer of `k` needs it: rows and cosines."""
        depth = k if self.hybrid is None else max(k, LISTED)
        hits = self.moment.search(
            vectors,
            max(1, min(depth, self.moment.items)),
            [one.unwanted for one in scopes],
            allow=[one.allow for one in scopes],
            allow_live=[one.allow_live for one in scopes],
        )
        counts = hits.counts.tolist()
        return [hits.rows[q, :n] for q, n in enumerate(counts)], [hits.scores[q, :n] for q, n in enumerate(counts)]
