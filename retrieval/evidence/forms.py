"""A model given as vectors, made into lists: plainly, from shorter and coarser item vectors, and as a hybrid first stage.

One pass over the queries in order of time serves all forms, so the vectors of each night are made once. The plain lists come
first and are the model; the other forms are reported apart and never stand for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
import numpy.typing as npt

from index.codes import Codes, rounded
from retrieval import records
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, MemberView
from retrieval.evidence.baselines import Knowledge
from retrieval.evidence.protocol import EvidenceError, Queries, member_views
from retrieval.evidence.ragged import Ints
from retrieval.evidence.rank import BLOCK_SCORES, DEPTH, Floats, Progress, Ranked, tie_order, top_rows
from retrieval.evidence.similarity import Probe
from retrieval.hybrid import Hybrid, HybridSettings
from retrieval.lexical import Lexical
from retrieval.popular import Popular


class VectorModel(Protocol):
    """A model whose score is the inner product of a member's and an item's vector."""

    @property
    def name(self) -> str: ...
    def item_vectors(self, day_start: int) -> Floats:
        """Float32 [N, D] of the whole catalogue with what was known at that second (the start of a day, or the cut)."""
        ...

    def member_vectors(self, views: Sequence[MemberView]) -> Floats:
        """Float32 [B, D] of members as of their queries."""
        ...


@dataclass(frozen=True)
class Sight:
    """What is in sight when the lists of B queries of one night are made.

    `views` [B] are the members in words, `members` [B, D] and `items` [N, D] the vectors, `moment` the second whose counts the
    items' prompts carry, `ties` the order of equal scores, `plain` the model's own lists.
    """

    queries: Queries
    views: Sequence[MemberView]
    members: Floats
    items: Floats
    moment: int
    ties: npt.NDArray[np.int64]
    plain: Ranked


class Form(Protocol):
    """Another way to make lists of the same vectors; `setting` tells what it is."""

    @property
    def name(self) -> str: ...
    @property
    def setting(self) -> str: ...
    def lists(self, sight: Sight) -> Ranked:
        """The lists of the queries in sight, as deep as the plain ones."""
        ...


@dataclass(frozen=True)
class CodedForm:
    """The first `dims` numbers of every vector, made unit again, and the items' kept in `codes`: as a snapshot keeps them."""

    model: str
    dims: int
    codes: Codes

    @property
    def name(self) -> str:
        return f"{self.model}, {self.dims} x {self.codes}"

    @property
    def setting(self) -> str:
        return f"{self.dims * np.dtype(self.codes).itemsize:,} bytes an item"

    def lists(self, sight: Sight) -> Ranked:
        """The lists by the product of the whole member vector (cut alike) and the coded item vector."""
        items = rounded(shortened(sight.items, self.dims), self.codes)
        return plain_lists(sight.queries, shortened(sight.members, self.dims), items, sight.ties, sight.plain.rows.shape[1])


class HybridForm:
    """The model's lists merged with one of words and one of what is popular, by the function that the service calls.

    The lexical index is over the whole catalogue, which is what every system here ranks; a night's is over the items that exist.
    """

    name = "Hybrid"

    def __init__(self, dataset: Dataset, counts: Knowledge, cut: int, settings: HybridSettings) -> None:
        self.settings = settings
        self._lexical = Lexical.of_items(dataset.items)
        self._counts = Counts.from_dataset(dataset, before=cut if counts == "frozen" else None)

    @property
    def setting(self) -> str:
        told = self.settings
        weights = f"{told.dense:g} dense, {told.lexical:g} lexical, {told.popular:g} popular"
        return f"reciprocal ranks: {weights}; constant {told.constant:g}, last {told.newest} items"

    def lists(self, sight: Sight) -> Ranked:
        """The merged lists."""
        hybrid = Hybrid(self._lexical, Popular.of_numbers(self._counts.as_of(sight.moment)), self.settings)
        found = _empty(*sight.plain.rows.shape)
        for at, view in enumerate(sight.views):
            dense = sight.plain.rows[at][sight.plain.rows[at] >= 0].astype(np.int64)
            rows, scores = hybrid.merge(dense, view, sight.queries.excluded[at], found.rows.shape[1])
            found.rows[at, : len(rows)], found.scores[at, : len(rows)] = rows, scores
        return found


def coded_forms(model: str, whole: int, dims: Sequence[int], codes: Sequence[Codes]) -> list[Form]:
    """Every wished length in every wished code, without the whole vectors in float32: those are the model itself.

    Raises EvidenceError for a length that vectors of `whole` numbers do not have.
    """
    if wrong := [length for length in dims if not 0 < length <= whole]:
        raise EvidenceError(f"Vectors of {wrong[0]} numbers were asked for; this encoder's have {whole}.")
    asked = product(dict.fromkeys(dims or [whole]), dict.fromkeys(codes or ["float32"]))
    return [CodedForm(model, length, code) for length, code in asked if (length, code) != (whole, "float32")]


def form_folder(name: str) -> str:
    """The folder name of a form's report: "Dual encoder, 32 x int8" -> "dual-encoder-32-x-int8"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shortened(vectors: Floats, dims: int) -> Floats:
    """The first `dims` numbers of unit vectors [n, D], made unit again, as the encoder cuts them; whole ones are untouched."""
    if dims == vectors.shape[1]:
        return vectors
    head = vectors[:, :dims]
    norm = np.linalg.norm(head, axis=1, keepdims=True)
    return np.asarray(head / np.where(norm > 0, norm, 1), np.float32)


def plain_lists(queries: Queries, members: Floats, items: Floats, ties: npt.NDArray[np.int64], depth: int) -> Ranked:
    """The lists of B queries by inner product over all items minus the history; members [B, D], items [N, D]."""
    scores = members @ items.T
    scores[queries.excluded.rows, queries.excluded.values] = -np.inf
    return top_rows(scores, depth, ties)


def rank_forms(
    dataset: Dataset,
    queries: Queries,
    model: VectorModel,
    counts: Knowledge,
    forms: Sequence[Form] = (),
    depth: int = DEPTH,
    progress: Progress | None = None,
    probe: Probe | None = None,
) -> list[Ranked]:
    """The model's own lists and then those of each form, in query order. The work is done in day order, so that each night's
    vectors are made once. `probe` looks at the vectors on the way; progress counts lists."""
    items, done = len(dataset.items), 0
    found = [_empty(len(queries), min(depth, items)) for _ in range(1 + len(forms))]
    for rows, sight in _sights(dataset, queries, model, counts, depth):
        if probe is not None:
            probe.see(sight.queries, sight.members, sight.items, sight.moment)
        for ranked, made in zip(found, [sight.plain, *(form.lists(sight) for form in forms)], strict=True):
            ranked.rows[rows], ranked.scores[rows] = made.rows, made.scores
        done += len(rows) * len(found)
        if progress is not None:
            progress(done, len(queries) * len(found))
    return found


def _sights(
    dataset: Dataset, queries: Queries, model: VectorModel, counts: Knowledge, depth: int
) -> Iterator[tuple[Ints, Sight]]:
    """Blocks of queries of one night with their positions, nights in order of time."""
    ties = tie_order(queries, len(dataset.items))
    moments = queries.day * DAY if counts == "live" else np.full(len(queries), queries.cut)
    order = np.argsort(queries.timestamp, kind="stable")
    step = max(1, BLOCK_SCORES // max(len(dataset.items), 1))
    items_of = _nightly(model, len(dataset.items))
    for begin in range(0, len(order), step):
        block = order[begin : begin + step]
        views = member_views(dataset, queries.take(block), newest=records.NEWEST)
        members = _checked(model.member_vectors(views), len(block), model.name)
        for moment in np.unique(moments[block]).tolist():
            places = np.flatnonzero(moments[block] == moment)
            asked, items = queries.take(block[places]), items_of(moment)
            plain = plain_lists(asked, members[places], items, ties, depth)
            seen = [views[place] for place in places.tolist()]
            yield block[places], Sight(asked, seen, members[places], items, moment, ties, plain)


def _nightly(model: VectorModel, items: int) -> Callable[[int], Floats]:
    """Item vectors by moment, the last night's kept."""
    kept: dict[int, Floats] = {}

    def items_of(moment: int) -> Floats:
        if moment not in kept:
            kept.clear()
            kept[moment] = _checked(model.item_vectors(moment), items, model.name)
        return kept[moment]

    return items_of


def _checked(vectors: Floats, expected: int, name: str) -> Floats:
    if vectors.ndim != 2 or len(vectors) != expected or not np.isfinite(vectors).all():
        raise EvidenceError(f"{name} returned vectors {vectors.shape}, expected {expected} rows of finite numbers.")
    return vectors


def _empty(queries: int, depth: int) -> Ranked:
    return Ranked(np.full((queries, depth), -1, np.int32), np.full((queries, depth), -np.inf, np.float32))
