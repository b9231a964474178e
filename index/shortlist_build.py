"""Makes the index of a short list, and measures the margins by which it is searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from index.centres import TRAINING_ROWS, trained
from index.hits import Vectors, check_queries
from index.recipe import GROUPS, BuildError, Recipe
from index.shortlist import ShortLists, wide

Progress = Callable[[int, int], None]
TRIED, DEPTHS = 24, (1, 10, 100, 300, 500, 700, 1_000, 1_400, 2_000, 5_000, 10_000)
"""Queries by which the bar of the short list is set, and how deep each looks: between these it is interpolated."""
_SEEN = 32
"""Rows that there must be for each of a depth: an eighth of the lists is read to try it."""
_FEW, _LONG = 300, 1_400
"""Fewer than the first: one miss is much. Fewer than the second: the best may end between one list and the next."""
_BLOCK_ROWS = 65_536


def filled(vectors: Vectors, lists: int, seed: int, progress: Progress | None = None) -> Any:
    """A FAISS index of the codes of vectors [N, D], row i under id i, is returned; the same for the same seed.

    It takes vectors of `Recipe.width` numbers, of which `ShortLists` knows. Raises BuildError for too few vectors.
    """
    import faiss as typed

    faiss: Any = typed
    count, dims = vectors.shape
    recipe = Recipe(lists, short=True)
    if count < recipe.least_rows or lists % GROUPS or not lists:
        raise BuildError(
            f"recipe {recipe} over {count} vectors: expected at least {recipe.least_rows} of them, "
            f"and a multiple of {GROUPS} lists"
        )
    width = recipe.width(dims)
    centres = wide(trained(vectors, lists, seed), width)
    # Of length 1, so that the nearest centre of a vector of length 1 is the one with the largest product: it finds itself.
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    nearest = faiss.IndexFlatL2(width)
    nearest.add(centres)
    index: Any = faiss.IndexIVFPQFastScan(nearest, width, lists, width // 2, 4, faiss.METRIC_INNER_PRODUCT)
    index.by_residual, index.pq.cp.seed = True, seed
    chosen = np.random.default_rng(seed).choice(count, min(count, TRAINING_ROWS * 1024), replace=False)
    index.train(wide(vectors[np.sort(chosen)], width))
    for start in range(0, count, _BLOCK_ROWS):
        index.add(wide(vectors[start : start + _BLOCK_ROWS], width))
        if progress is not None:
            progress(min(start + _BLOCK_ROWS, count), count)
    # Vectors went to the nearest centre; a query goes by its product, and by group. FAISS owns it, as if it had been read.
    centres[:, dims] = 1 - 2 * (np.arange(lists) % GROUPS)
    by_product = faiss.IndexFlatIP(width)
    by_product.add(centres)
    index.quantizer, index.own_fields = by_product, True
    by_product.this.disown()
    return index


def margins_of(index: Any, vectors: Vectors, queries: Vectors) -> dict[int, float]:
    """How far below the foretold score the bar must lie for queries of length 1, by depth: what the first TRIED need.

    What most of them need where a list is long, what hardly any exceeds where it is not.
    """
    lists = ShortLists(index, vectors, nprobe=max(1, int(index.nlist) // 8), margins={1: 0.0})
    depths = [depth for depth in DEPTHS if depth == 1 or _SEEN * depth <= len(vectors)]
    queries = check_queries(queries, lists.dims)
    tried = queries[np.linspace(0, len(queries) - 1, min(TRIED, len(queries))).astype(int)]
    needed = [each for query in tried if (each := lists.needed(query, depths)) is not None]
    if not needed:  # all the same, or nothing: whatever the bar, it is answered by scoring everything
        return {1: 0.0}
    half, three_of_four, nine_of_ten, highest = np.quantile(needed, (0.5, 0.75, 0.9, 1.0), axis=0)
    hardly_any = highest + (highest - half) / 4
    few = [at for at, depth in enumerate(depths) if depth < _FEW]
    hardly_any[few] = max(hardly_any[few].max(), 0.0)  # a few more rows cost nothing, and 24 queries say little of the one best
    by_depth = [hardly_any if depth < _FEW else nine_of_ten if depth < _LONG else three_of_four for depth in depths]
    return {depth: float(margins[at]) for at, (depth, margins) in enumerate(zip(depths, by_depth))}
