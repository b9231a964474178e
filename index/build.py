"""Chooses, trains and fills a FAISS index, and finds by measurement how many lists a search must visit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from index.centres import TRAINING_ROWS as CENTRE_ROWS
from index.certified import truth
from index.codes import Codes, rounded
from index.exact import overlap
from index.hits import Hits, Rows, Vectors
from index.kinds import MARGIN, NPROBE, Lists, searcher
from index.manifest import Fact, Recall
from index.recipe import BuildError, Recipe, choose_recipe
from index.search import Search
from index.shards import Shards
from index.shortlist_build import filled, margins_of

Progress = Callable[[int, int], None]

TRAINING_ROWS_PER_LIST = 64
"""k-means wants at least 39 points per centroid (FAISS warns below that) and gains little beyond a few times that."""
FAR_OFF = 4
"""A recipe holds for this many times more or fewer vectors than it was measured on: that is a factor 2 in the lists."""
RECALL_KS = (10, 100, 2_000)
"""How deep the recall is written down, mean and worst twentieth, whatever k the lists were chosen for."""
_BLOCK_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Plan:
    """What a night is to build: a recipe (None: by size), the `target` mean recall at `k`, the seed. `brewline index tune` writes
    one, measured on `items` vectors of `dims` numbers."""

    recipe: Recipe | None = None
    k: int = 2_000
    target: float = 0.95
    seed: int = 0
    items: int = 0
    dims: int = 0

    def require(self, count: int, dims: int) -> None:
        """Nothing happens if the plan was measured on vectors like these `count` of `dims` numbers. Raises BuildError."""
        if self.recipe is None:
            return
        if dims != self.dims or not self.items <= FAR_OFF * count <= FAR_OFF**2 * self.items or self.recipe.least_rows > count:
            raise BuildError(
                f"recipe {self.recipe} was measured on {self.items:,} x {self.dims}, there are {count:,} x {dims}; "
                f"expected these dims and a count within {FAR_OFF} times: run `brewline index tune` on these, or leave it out"
            )

    def facts(self) -> dict[str, Fact]:
        """What a manifest says of a plan that was measured; nothing of the one by size."""
        if self.recipe is None:
            return {}
        return {"target_k": self.k, "tuned_items": self.items, "tuned_dims": self.dims}


@dataclass(frozen=True, slots=True)
class Built:
    """Filled indexes of one recipe, one for each shard (not divided: one, of all rows), and the facts of their building (training
    rows, seed, nprobe); `search` asks them together, visiting as many lists as that took, and finds the measured recall."""

    indexes: Sequence[Any]
    recipe: Recipe
    facts: dict[str, Fact]
    recall: Recall | None
    search: Search

    @property
    def index(self) -> Any:
        """The index of what is not divided."""
        return self.indexes[0]


def build_index(vectors: Vectors, recipe: Recipe, seed: int, progress: Progress | None = None) -> Any:
    """A FAISS inner-product index over vectors [N, D] is returned, row i under id i.

    The same vectors, recipe and seed give the same index. Raises BuildError for NaN, infinity or fewer rows than lists.
    """
    count, dims = _shape(vectors)
    if recipe.least_rows > count:
        raise BuildError(f"recipe {recipe} needs at least {recipe.least_rows} vectors, there are {count}: use Flat")
    if recipe.short:
        for start in range(0, count, _BLOCK_ROWS):
            _finite(vectors[start : start + _BLOCK_ROWS], start)
        return filled(vectors, recipe.lists, seed, progress)
    index = _empty(dims, recipe)
    if recipe.lists:
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1
        index.train(_finite(vectors[sample_rows(count, training_rows(count, recipe), seed)], 0))
    for start in range(0, count, _BLOCK_ROWS):
        index.add(_finite(vectors[start : start + _BLOCK_ROWS], start))
        if progress is not None:
            progress(min(start + _BLOCK_ROWS, count), count)
    return index


def _empty(dims: int, recipe: Recipe) -> Any:
    import faiss

    metric, half = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_fp16
    if not recipe.lists:
        return faiss.IndexScalarQuantizer(dims, half, metric) if recipe.half else faiss.IndexFlatIP(dims)
    if recipe.half:
        # Residuals would be rounded instead of the vectors: other numbers than those that the snapshot keeps.
        return faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dims), dims, recipe.lists, half, metric, False)
    return faiss.IndexIVFFlat(faiss.IndexFlatIP(dims), dims, recipe.lists, metric)


def training_rows(count: int, recipe: Recipe) -> int:
    """How many of `count` rows the lists are trained on is returned: 0 for Flat."""
    return min(count, (CENTRE_ROWS if recipe.short else TRAINING_ROWS_PER_LIST) * recipe.lists)


def build(
    vectors: Vectors,
    *,
    recipe: Recipe | None = None,
    codes: Codes = "float32",
    seed: int = 0,
    k: int = 2_000,
    target: float = 0.95,
    queries: Vectors | None = None,
    samples: int = 128,
    shards: Sequence[Rows] = (),
    progress: Progress | None = None,
) -> Built:
    """An index is returned whose searches reach `target` mean recall@k against exact search on sampled queries.

    With `shards`, the rows of each, there is one for each of them, all of one recipe, and the merged answer reaches the target.

    `queries` [Q, D] are real query vectors (members' of last night): they lie elsewhere than items, and a recall measured on
    items flatters; without them sampled items must do, and the recall says so. k is at most N. With `codes` the index is over
    what the snapshot keeps of the vectors, and the recall is against exact search in those. Raises CodesError, and BuildError,
    also where a short list cannot reach the target: all of its lists are not everything.
    """
    count, dims = _shape(vectors)
    recipe = recipe or choose_recipe(count // max(1, len(shards)), dims, codes)
    vectors = vectors if codes == "float32" else rounded(vectors, codes)
    indexes = _indexes(vectors, shards, recipe, seed, progress)
    trained = sum(training_rows(one.ntotal, recipe) for one in indexes)
    facts: dict[str, Fact] = {"seed": seed, NPROBE: 0, "training_rows": trained}
    if count == 0:
        return Built(indexes, recipe, facts, None, _together(_each(indexes, recipe, vectors, shards, {}), shards))
    asked = sample_queries(vectors if queries is None else queries, samples, seed)
    margins: dict[int, float] = {}
    if recipe.short:
        for index, part in zip(indexes, _parts(vectors, shards)):
            for depth, margin in margins_of(index, part, asked).items():
                margins[depth] = max(margin, margins.get(depth, margin))
    facts.update({f"{MARGIN}{depth}": margin for depth, margin in margins.items()})
    each = _each(indexes, recipe, vectors, shards, margins)
    together = _together(each, shards)
    source = "items" if queries is None else "members"
    true = truth(vectors, asked, min(k, count))

    def find(nprobe: int) -> Hits:
        for one in each:
            one.nprobe = nprobe
        return together.search(asked, true.rows.shape[1])

    nprobe, recall = _least(recipe.lists, lambda probes: summarise(vectors, asked, find(probes), true, source), target)
    if recipe.short and recall.mean < target:
        raise BuildError(
            f"{recipe} reaches recall@{recall.k} {recall.mean:.4f} with all its lists, {target} is asked: "
            "ask less, or for lists that are read in full (IVF<lists>,Flat)"
        )
    facts.update({NPROBE: nprobe}, target_recall=target, recall_source=source)
    found = find(nprobe)
    for depth in (depth for depth in RECALL_KS if depth <= true.rows.shape[1]):
        seen = summarise(vectors, asked, _first(found, depth), _first(true, depth), source)
        facts.update({f"recall@{depth}": seen.mean, f"recall@{depth}_p5": seen.p5})
    return Built(indexes, recipe, facts, recall, together)


def _indexes(vectors: Vectors, shards: Sequence[Rows], recipe: Recipe, seed: int, progress: Progress | None) -> list[Any]:
    """The index of each shard, whose vectors are copied for it, one shard at a time; or the one of all."""
    if not shards:
        return [build_index(vectors, recipe, seed, progress)]
    made: list[Any] = []
    for rows in shards:
        made.append(build_index(vectors[rows], recipe, seed))
        if progress is not None:
            progress(sum(index.ntotal for index in made), len(vectors))
    return made


def _each(
    indexes: Sequence[Any], recipe: Recipe, vectors: Vectors, shards: Sequence[Rows], margins: Mapping[int, float]
) -> list[Lists]:
    least = min(1, recipe.lists)
    return [searcher(index, recipe, part, nprobe=least, margins=margins) for index, part in zip(indexes, _parts(vectors, shards))]


def _together(each: Sequence[Search], shards: Sequence[Rows]) -> Search:
    return Shards(each, shards) if shards else each[0]


def _parts(vectors: Vectors, shards: Sequence[Rows]) -> Iterator[Vectors]:
    """The vectors of each shard, copied one after the other; or all of them."""
    return (vectors[rows] for rows in shards) if shards else iter([vectors])


def least_probes(search: Lists, lists: int, vectors: Vectors, queries: Vectors, true: Hits, target: float, source: str) -> Recall:
    """`search` visits the smallest number of its lists found to reach `target` mean recall; what it reaches is returned.

    Doubling until it is reached, then halving the gap. All lists are exact but for a short list, which may fall short of it.
    """

    def measure(nprobe: int) -> Recall:
        search.nprobe = nprobe
        return summarise(vectors, queries, search.search(queries, true.rows.shape[1]), true, source)

    search.nprobe, recall = _least(lists, measure, target)
    return recall


def _least(lists: int, measure: Callable[[int], Recall], target: float) -> tuple[int, Recall]:
    """The smallest number of so many lists that is found to measure the target mean recall, and that recall."""
    if lists == 0:
        return 0, measure(0)
    low, high = 0, 1
    recall = measure(high)
    while recall.mean < target and high < lists:
        low, high = high, min(2 * high, lists)
        recall = measure(high)
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        at_middle = measure(middle)
        if at_middle.mean >= target:
            high, recall = middle, at_middle
        else:
            low = middle
    return high, recall


def summarise(vectors: Vectors, queries: Vectors, found: Hits, true: Hits, source: str) -> Recall:
    """Mean and 5th percentile of the recall over queries are returned, with k and where the queries came from."""
    shares = overlap(vectors, queries, found, true).astype(np.float64)
    k = true.rows.shape[1]
    return Recall(k, round(float(shares.mean()), 6), round(float(np.quantile(shares, 0.05)), 6), len(shares), source)


def _first(hits: Hits, depth: int) -> Hits:
    return Hits(hits.rows[:, :depth], hits.scores[:, :depth], np.minimum(hits.counts, depth))


def sample_queries(vectors: Vectors, samples: int, seed: int) -> Vectors:
    """At most `samples` of these rows are returned as float32 [Q, D], the same ones for the same seed."""
    rows = sample_rows(len(vectors), samples, seed)
    return np.asarray(vectors[rows], dtype=np.float32)


def sample_rows(count: int, wanted: int, seed: int) -> Rows:
    """At most `wanted` of 0..count-1 are returned, rising, the same ones for the same seed."""
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def _shape(vectors: Vectors) -> tuple[int, int]:
    if vectors.ndim != 2 or vectors.shape[1] == 0 or vectors.dtype.kind != "f":
        raise BuildError(f"vectors are {vectors.dtype}{list(vectors.shape)}, expected floats [N, D] with D > 0")
    return vectors.shape[0], vectors.shape[1]


def _finite(block: Vectors, start: int) -> Vectors:
    with np.errstate(over="ignore"):
        checked: Vectors = np.ascontiguousarray(block, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(checked).all(axis=1))
    if bad.size:
        raise BuildError(f"vector {start + bad[0]} holds NaN or infinity ({bad.size} in this block): encode it again")
    return checked
