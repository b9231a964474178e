"""From a member to candidates: words become a vector, the vector finds its nearest items, and what was seen stays away."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from index.certified import within
from index.errors import BrewlineError
from index.filters import RowSet
from index.hits import Rows
from index.live_view import LiveTable, LiveView
from index.snapshot import Snapshot
from retrieval.attributes import EVERYTHING, Wanted
from retrieval.catalog import Catalog
from retrieval.data.schema import IMPRESSION, Connection, MemberView
from retrieval.hybrid import LISTED, Hybrid, HybridError
from retrieval.live_catalog import LiveCatalog, LiveItems

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

FirstStage = Literal["dense", "hybrid"]
Vector = npt.NDArray[np.float32]


class ExclusionFailed(BrewlineError):
    """A search returned an item that it was told to leave out; the answer is withheld."""


@dataclass(frozen=True)
class Candidates:
    """C items, best first: `ids` [C], `rows` int64 [C] of the moment, `scores` float32 [C] of the first stage that found them:
    the cosine of the dense one, the merged score of the hybrid one."""

    ids: list[str]
    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Retriever:
    """One encoder and one moment of an index of the same encoder, with its catalogue; with `hybrid` two more lists, merged with
    the dense one. Those are the night's: an item put in since is found by its vector only."""

    encoder: Encoder
    moment: LiveView
    catalog: LiveCatalog
    hybrid: Hybrid | None = None

    @classmethod
    def of(cls, snapshot: Snapshot, encoder: Encoder, *, hybrid: Hybrid | None = None) -> Retriever:
        """A retriever over a snapshot as the night left it."""
        view = LiveTable(snapshot, 0).view
        return cls(encoder, view, LiveCatalog(Catalog.open(snapshot), view, LiveItems()), hybrid)

    @property
    def first_stage(self) -> FirstStage:
        """What finds the candidates."""
        return "dense" if self.hybrid is None else "hybrid"

    def describe(self, view: MemberView) -> Vector:
        """The member as a unit vector float32 [D]."""
        vector: Vector = self.encoder.members([view])[0]
        return vector

    def retrieve(
        self,
        vector: Vector,
        k: int,
        exclude: Collection[str] = (),
        view: MemberView | None = None,
        wanted: Wanted = EVERYTHING,
    ) -> Candidates:
        """The `k` best items for a vector [D] (fewer if fewer are left) that are `wanted`, none of them in `exclude`.

        Best is nearest; with `hybrid` it is what the merged lists say, and `view` is the member in words (HybridError without);
        its connections are those that `wanted` may ask for. Ids that the catalogue does not hold exclude nothing. Raises
        UnknownAttribute, and ExclusionFailed rather than return an item that must not be answered.
        """
        moment = self.moment
        unwanted = self.excluded_rows(exclude)
        allow, allow_live = self._allowed(wanted, () if view is None else view.connections)
        depth = k if self.hybrid is None else max(k, LISTED)
        size = max(1, min(depth, moment.items))
        hits = moment.search(vector[None, :], size, [unwanted], allow=allow, allow_live=allow_live)
        rows, scores = hits.rows[0, : hits.counts[0]], hits.scores[0, : hits.counts[0]]
        return self._answer(rows, scores, k, view, unwanted, allow, allow_live)

    def _answer(
        self,
        rows: Rows,
        scores: Vector,
        k: int,
        view: MemberView | None,
        unwanted: Rows,
        allow: RowSet | None,
        allow_live: RowSet | None,
    ) -> Candidates:
        """The candidates of one dense list: merged with the other lists if there are any, and looked at once more."""
        if self.hybrid is not None:
            if view is None:
                raise HybridError("the hybrid first stage was given a vector only; it reads the member's words too")
            rows, scores = self.hybrid.merge(rows, view, self._forbidden(unwanted, allow), k)
        if not self._permitted(rows, unwanted, allow, allow_live):
            raise ExclusionFailed(
                "the search returned an item that it was told to leave out; the answer is withheld, verify the snapshot"
            )
        return Candidates(self.catalog.ids(rows), rows, scores)

    def cosines(self, vector: Vector, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [C]: the cosine of a member's vector [D] and each row's, whatever found the rows."""
        found = np.empty((len(rows), len(vector)), np.float32)
        older = rows < self.moment.first_live
        found[older] = self.moment.snapshot.vectors_at(rows[older])
        for place in np.flatnonzero(~older).tolist():
            found[place] = self.moment.vector(int(rows[place]))
        return np.asarray(found @ vector, np.float64)

    def excluded_rows(self, exclude: Collection[str]) -> npt.NDArray[np.int64]:
        """int64: the distinct rows of the ids that the catalogue holds, rising."""
        rows = np.unique(self.catalog.rows(list(exclude)))
        return rows[rows >= 0]

    def _allowed(self, wanted: Wanted, connections: Sequence[Connection]) -> tuple[RowSet | None, RowSet | None]:
        """The rows of the night and the live rows that are wanted; None for all."""
        if wanted == EVERYTHING:
            return None, None
        moment, connected = self.moment, {edge.other_id for edge in connections}
        night = wanted.rows(self.catalog.attribute, connected, moment.first_live)
        return night, wanted.rows(self.catalog.live_attribute, connected, moment.count - moment.first_live)

    def _forbidden(self, unwanted: Rows, allow: RowSet | None) -> Rows:
        """The night's rows that no list may hold."""
        older = unwanted[unwanted < self.moment.first_live]
        if allow is None and not self.moment.hidden.size:
            return older
        return (self.moment.hidden if allow is None else self.moment.hidden | ~allow).plus(older).rows()

    def _permitted(self, rows: Rows, unwanted: Rows, allow: RowSet | None, allow_live: RowSet | None) -> bool:
        """Whether an answer may hold all these rows: looked at once more, whatever found them."""
        moment, night = self.moment, rows < self.moment.first_live
        older, newer = rows[night], rows[~night] - self.moment.first_live
        asked_away = unwanted.size and within(rows, unwanted).any()
        good = not moment.hidden.has(older).any() and moment.alive.has(newer).all() and not asked_away
        if allow is not None and allow_live is not None:
            good = good and allow.has(older).all() and allow_live.has(newer).all()
        return bool(good)


def seen_items(view: MemberView) -> list[str]:
    """The ids that a member has engaged with; one that was only shown may be recommended again."""
    return [done.item.item_id for done in view.history if done.action != IMPRESSION]


def distinct(*groups: Sequence[str]) -> list[str]:
    """All ids of the groups, each once, in order of first sight."""
    return list(dict.fromkeys(item_id for group in groups for item_id in group))
