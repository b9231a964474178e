"""The simple models that a learnt one has to beat: what they share, neighbours, EASE, chance and the oracle.

Every baseline is a small frozen record of its settings; `fit(past)` returns a scorer of query blocks. "frozen" baselines know
other members' events before the cut only, "live" ones up to the end of the day before the query. The history of the queried
member itself is known to all of them up to the query (that is the protocol).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse as sp

from retrieval.data.schema import Dataset, Events
from retrieval.evidence.protocol import EvidenceError, Queries, Window
from retrieval.evidence.rank import Scorer
from retrieval.terms import Terms

Knowledge = Literal["frozen", "live"]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Past:
    """What a baseline may be fitted on: a catalogue and the engagements before the cut of a window."""

    dataset: Dataset
    window: Window
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def before(self) -> int:
        """The cut: fitting sees nothing at or after it."""
        return self.dataset.meta.cut_test if self.window == "test" else self.dataset.meta.cut_valid

    @cached_property
    def events(self) -> Events:
        """The engagements before the cut, in time order."""
        return self.dataset.engagements.before(self.before)

    @cached_property
    def counts(self) -> npt.NDArray[np.float64]:
        """Float64 [N]: engagements of each item before the cut."""
        return np.bincount(self.events.item, minlength=len(self.dataset.items)).astype(np.float64)

    @cached_property
    def matrix(self) -> sp.csr_matrix:
        """Float32 [M, N], 1 where the member engaged with the item before the cut."""
        shape = (len(self.dataset.members), len(self.dataset.items))
        ones = np.ones(len(self.events), np.float32)
        matrix = sp.csr_matrix((ones, (self.events.member, self.events.item)), shape)
        matrix.data[:] = 1
        return matrix

    @cached_property
    def together(self) -> sp.csr_matrix:
        """Float32 [N, N]: how many members engaged with both items."""
        return (self.matrix.T @ self.matrix).tocsr()

    @cached_property
    def terms(self) -> Terms:
        """The words of the catalogue."""
        return Terms.of_items(self.dataset.items)

    def nearest(self, neighbours: int, shrink: float) -> sp.csr_matrix:
        """Float32 [N, N]: item-kNN similarities; the latest are kept, so that a grid of decays fits once."""
        return self.kept(("nearest", neighbours, shrink), lambda: _nearest(self.together, shrink, neighbours))

    def ease(self, head: npt.NDArray[np.int64], penalty: float) -> Floats:
        """Float32 [H, H]: EASE weights of the head items; the latest are kept."""
        return self.kept(("ease", len(head), penalty), lambda: _ease_weights(self.together[head][:, head].toarray(), penalty))

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Returns what was made under this key; only the latest key is remembered."""
        if self._kept.get("key") != key:
            self._kept.update(key=key, value=make())
        return self._kept["value"]


class Baseline(Protocol):
    """A simple model with its settings; `setting` is what a table prints beside the name."""

    @property
    def name(self) -> str: ...
    @property
    def knowledge(self) -> Knowledge: ...
    @property
    def setting(self) -> str: ...
    def fit(self, past: Past) -> Scorer:
        """Returns a scorer that has read `past` and, if live, other members' events up to the day before each query."""
        ...


class Truth(Protocol):
    """A world that knows how likely a member at a moment is to engage with each item."""

    def engage_scores(self, member_row: int, timestamp: int) -> npt.NDArray[np.float64]: ...


def history_matrix(queries: Queries, items: int, decay: float = 1.0, newest: int | None = None) -> sp.csr_matrix:
    """Returns float32 [B, N]: decay^age of the histories' items, age 0 = the newest (an item seen twice adds up)."""
    history = queries.history
    age = history.from_end
    weight = np.power(decay, age) if newest is None else (age < newest) * np.power(decay, age)
    item = queries.events.item[history.values]
    return sp.csr_matrix((weight.astype(np.float32), (history.rows, item)), (len(queries), items))


@dataclass(frozen=True)
class Random:
    """Chance: one shuffled row of scores, rotated by a random step for each member."""

    seed: int = 0
    name: str = "Random"
    knowledge: Knowledge = "frozen"

    @property
    def setting(self) -> str:
        return f"seed {self.seed}"

    def fit(self, past: Past) -> Scorer:
        items = len(past.dataset.items)

        rng = np.random.default_rng(self.seed)
        row = np.tile(rng.permutation(items).astype(np.float32), 2)
        step = rng.integers(0, items, len(past.dataset.members))
        return lambda queries: np.stack([row[begin : begin + items] for begin in step[queries.member].tolist()])


@dataclass(frozen=True)
class ItemNeighbours:
    """Item-kNN: cosine of the members of two items, shrunk, the nearest `neighbours` kept; newest history counts most."""

    neighbours: int = 1000
    shrink: float = 50.0
    decay: float = 0.7
    name: str = "Item-kNN"
    knowledge: Knowledge = "frozen"

    @property
    def setting(self) -> str:
        return f"k={self.neighbours} shrink={self.shrink:g} decay={self.decay:g}"

    def fit(self, past: Past) -> Scorer:
        nearest = past.nearest(self.neighbours, self.shrink)
        return lambda queries: (history_matrix(queries, nearest.shape[0], self.decay) @ nearest).toarray()


def _nearest(together: sp.csr_matrix, shrink: float, neighbours: int) -> sp.csr_matrix:
    """Shrunk cosine [N, N] without the diagonal; each row keeps its largest entries."""
    cosine = together.tocoo()
    norm = np.sqrt(together.diagonal())
    other = cosine.row != cosine.col
    row, column = cosine.row[other], cosine.col[other]
    value = cosine.data[other] / (norm[row] * norm[column] + shrink)
    order = np.lexsort((-value, row))
    row, column, value = row[order], column[order], value[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < neighbours
    return sp.csr_matrix((value[kept].astype(np.float32), (row[kept], column[kept])), together.shape)


@dataclass(frozen=True)
class Ease:
    """EASE^R (Steck 2019), the closed-form linear autoencoder, over the `head` most engaged items; the rest score 0."""

    penalty: float = 2000.0
    decay: float = 0.9
    head: int = 6000
    name: str = "EASE^R"
    knowledge: Knowledge = "frozen"

    @property
    def setting(self) -> str:
        return f"lambda={self.penalty:g} decay={self.decay:g}"

    def fit(self, past: Past) -> Scorer:
        items = len(past.dataset.items)
        head = np.sort(np.argsort(-past.counts, kind="stable")[: min(self.head, int((past.counts > 0).sum()))])
        weights = past.ease(head, self.penalty)

        def score(queries: Queries) -> Floats:
            # Below zero the weights are noise: there popularity, which breaks ties, is the better guess.
            scores = np.zeros((len(queries), items), np.float32)
            scores[:, head] = np.maximum(history_matrix(queries, items, self.decay)[:, head] @ weights, 0)
            return scores

        return score


def _ease_weights(gram: Floats, penalty: float) -> Floats:
    """B = I - P / diag(P) with P = (G + penalty I)^-1, diagonal zero; [H, H]."""
    gram[np.diag_indices(len(gram))] += penalty
    inverse = scipy.linalg.inv(gram, overwrite_a=True, check_finite=False)
    inverse /= -np.diag(inverse).copy()
    inverse[np.diag_indices(len(inverse))] = 0
    return inverse


@dataclass(frozen=True)
class Oracle:
    """The ceiling in an invented world: items in the order of the true chance of engagement."""

    truth: Truth
    name: str = "Oracle"
    knowledge: Knowledge = "live"
    setting: str = "the world's own probabilities"

    def fit(self, past: Past) -> Scorer:
        items = len(past.dataset.items)

        def score(queries: Queries) -> Floats:
            moments = zip(queries.member.tolist(), queries.timestamp.tolist(), strict=True)
            scores = np.stack([self.truth.engage_scores(member, moment) for member, moment in moments])
            if scores.shape[1] != items:
                raise EvidenceError(f"The truth knows {scores.shape[1]} items, the catalogue has {items}.")
            return scores.astype(np.float32)

        return score
