"""From a member to candidates: words become a vector, the vector finds its nearest items, and what was seen stays away."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from index.search import Searcher
from retrieval.catalog import Catalog
from retrieval.data.schema import IMPRESSION, MemberView

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

Vector = npt.NDArray[np.float32]


class ExclusionFailed(BrewlineError):
    """A search returned an item that it was told to leave out; the answer is withheld."""


@dataclass(frozen=True)
class Candidates:
    """C items by falling cosine: `ids` [C], `rows` int64 [C] of the snapshot, `scores` float32 [C]."""

    ids: list[str]
    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Retriever:
    """One encoder, one index and one catalogue of the same night."""

    encoder: Encoder
    searcher: Searcher
    catalog: Catalog

    def describe(self, view: MemberView) -> Vector:
        """The member as a unit vector float32 [D]."""
        vector: Vector = self.encoder.members([view])[0]
        return vector

    def retrieve(self, vector: Vector, k: int, exclude: Collection[str] = ()) -> Candidates:
        """The `k` nearest items to a vector [D] (fewer if fewer are left), none of them in `exclude`.

        Ids that the catalogue does not hold exclude nothing. Raises ExclusionFailed rather than return an excluded item.
        """
        unwanted = self.excluded_rows(exclude)
        hits = self.searcher.search(vector[None, :], min(k, len(self.catalog)), [unwanted])
        rows, scores = hits.rows[0, : hits.counts[0]], hits.scores[0, : hits.counts[0]]
        if np.isin(rows, unwanted).any():
            raise ExclusionFailed("the search returned an excluded item; the answer is withheld, verify the snapshot")
        return Candidates(self.catalog.ids(rows), rows, scores)

    def excluded_rows(self, exclude: Collection[str]) -> npt.NDArray[np.int64]:
        """int64: the distinct rows of the ids that the catalogue holds, rising."""
        rows = np.unique(self.catalog.rows(list(exclude)))
        return rows[rows >= 0]


def seen_items(view: MemberView) -> list[str]:
    """The ids that a member has engaged with; one that was only shown may be recommended again."""
    return [done.item.item_id for done in view.history if done.action != IMPRESSION]


def distinct(*groups: Sequence[str]) -> list[str]:
    """All ids of the groups, each once, in order of first sight."""
    return list(dict.fromkeys(item_id for group in groups for item_id in group))
