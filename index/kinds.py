"""What answers by an index, whatever kind its recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from index.hits import SearchError, Vectors
from index.manifest import SnapshotTorn
from index.recipe import Recipe
from index.search import Searcher
from index.shortlist import ShortLists
from index.snapshot import Shard, Snapshot

NPROBE, MARGIN = "nprobe", "margin@"
"""Build facts of a manifest: how many lists a search visits, and how far below what is foretold for a depth a short list ends."""
Lists = Searcher | ShortLists


def searcher(index: Any, recipe: Recipe, vectors: Vectors, *, nprobe: int, margins: Mapping[int, float]) -> Lists:
    """What searches a FAISS index of this recipe is returned. A short list alone reads the vectors [N, D] and has margins."""
    if recipe.short:
        return ShortLists(index, vectors, nprobe=nprobe, margins=margins)
    return Searcher(index, nprobe=nprobe)


def as_recipe(built: Snapshot | Shard, threads: int | None = None) -> Lists:
    """What searches one index as it was built is returned; a short list is read by at most so many threads.

    Raises SnapshotTorn, and SnapshotError for a divided snapshot: see `index.shards.as_built`.
    """
    facts = built.manifest
    if not Recipe.parse(facts.recipe).short:
        return Searcher.of(built)
    try:
        nprobe = int(facts.build[NPROBE])
        margins = {int(name.removeprefix(MARGIN)): float(fact) for name, fact in facts.build.items() if name.startswith(MARGIN)}
        return ShortLists(built.index, built.vectors, nprobe=nprobe, margins=margins, threads=threads)
    except (KeyError, ValueError, SearchError) as error:
        raise SnapshotTorn(f"snapshot {built.path.name}: its build facts do not open a short list ({error!r})") from None
