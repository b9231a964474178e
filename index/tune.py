"""Measures which index reaches a recall at k soonest, predicts what each will weigh, and writes the choice down."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from index.build import Plan, build_index, least_probes, training_rows
from index.certified import Certified, truth
from index.certified_codes import coded_bytes
from index.codes import Codes
from index.errors import BrewlineError
from index.hits import Vectors
from index.kinds import searcher
from index.recipe import SHORT_ROWS, BuildError, Recipe, choose_lists, choose_recipe, choose_short_lists
from index.search import Search
from index.serving import faiss_reason
from index.shortlist_build import margins_of

TARGETS = (0.8, 0.9, 0.95, 0.97, 0.99)
"""Recalls between which the frontier is drawn; the wished one is added."""
_ROW_BYTES = 8
"""FAISS keeps an id of 8 bytes with every vector of a list."""
_FASTSCAN_ROWS = 32
"""A list of fast-scan codes is filled up to a multiple of this."""
_NUMBER = {"float32": 4, "float16": 2, "int8": 1}


class TuneError(BrewlineError):
    """No index satisfies the wishes, or a recipe file cannot be read."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """`target` mean recall at `k`, at most `most_ms` a query (median) and `most_bytes` of memory; None: whatever it takes."""

    k: int = 2_000
    target: float = 0.95
    most_ms: float | None = None
    most_bytes: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Weight:
    """Bytes that a snapshot with this index is predicted to take, in memory when served and on disk (ids not counted)."""

    memory: int
    disk: int


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe at one number of visited lists: recall over the queries, median milliseconds of single queries."""

    recipe: str
    nprobe: int
    recall: float
    recall_p5: float
    p50_ms: float
    build_seconds: float
    weight: Weight


@dataclass(frozen=True, slots=True)
class Choice:
    """What the nightly job builds: the recipe, the recall it must reach at k, the seed; for so many items of so many dims.

    `measured` says why.
    """

    recipe: str
    k: int
    target: float
    seed: int
    items: int
    dims: int
    training_rows: int
    source: str
    measured: Point

    def write(self, path: Path) -> None:
        """The choice is in the file, as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_choice(path: Path) -> Plan:
    """What the file that `Choice.write` wrote tells to build is returned. Raises TuneError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        recipe, target = Recipe.parse(raw["recipe"]), raw["target"]
        k, seed, items, dims = (raw[name] for name in ("k", "seed", "items", "dims"))
    except (OSError, ValueError, TypeError, KeyError, BuildError) as error:
        raise TuneError(f"recipe file {path}: {error!r}; expected what `brewline index tune --out` writes") from None
    whole = all(type(number) is int and number >= least for number, least in ((k, 1), (seed, 0), (items, 1), (dims, 1)))
    if not whole or type(target) is not float or not 0 < target <= 1:
        raise TuneError(
            f"recipe file {path}: k {k!r}, seed {seed!r}, items {items!r}, dims {dims!r}, target {target!r}: expected whole "
            "numbers, seed >= 0, the others >= 1, and a target in (0, 1]"
        )
    return Plan(recipe, k, target, seed, items, dims)


def predict(count: int, dims: int, recipe: Recipe, codes: Codes = "float32") -> Weight:
    """The weight of N vectors is returned before anything is built. Kept vectors are mapped, not loaded, if float32.

    Where the certified scan answers it maps the vectors instead of FAISS's file, and its codes come on top. A short list reads
    the mapped vectors all the time, so they count.
    """
    index, width = count * dims * (2 if recipe.half else 4), recipe.width(dims)
    if recipe.short:
        pairs = width // 2
        index = (count + recipe.lists * _FASTSCAN_ROWS // 2) * -(-pairs // 2) + pairs * 16 * 2 * 4
    if recipe.lists:
        index += count * _ROW_BYTES + recipe.lists * width * 4
    kept = count * dims * _NUMBER[codes]
    served = coded_bytes(count, dims) if not faiss_reason(str(recipe), codes, count, dims) else 0
    if codes != "float32" or recipe.short:
        served += count * dims * 4
    return Weight(memory=index + served, disk=index + kept)


def candidates(count: int, dims: int, wishes: Wishes) -> list[Recipe]:
    """The recipes worth measuring at this size and within the memory are returned. Raises TuneError if none is."""
    middle = choose_lists(count if choose_recipe(count, dims).lists else max(count, 1_000_000))
    lists = [0, *(many for many in (middle // 2, middle, 2 * middle, 4 * middle) if 39 * many <= count)]
    found = [Recipe(many, half) for many in lists for half in (False, True)]
    if count >= SHORT_ROWS:
        least = choose_short_lists(count)
        found += [Recipe(many, short=True) for many in (least // 2, least)]
    if wishes.most_bytes is not None:
        found = [recipe for recipe in found if predict(count, dims, recipe).memory <= wishes.most_bytes]
    if not found:
        least = predict(count, dims, Recipe(0, True)).memory
        raise TuneError(f"{count} x {dims} need at least {least} bytes of memory, {wishes.most_bytes} are allowed: allow more")
    return found


def frontier(vectors: Vectors, queries: Vectors, recipes: Sequence[Recipe], wishes: Wishes, source: str) -> Iterator[Point]:
    """Every recipe is built, measured at each recall of the frontier and freed; its points are yielded.

    Wished recalls above what exact search in its codes finds do not occur: visiting all lists is the end.
    """
    k = min(wishes.k, len(vectors))
    true = truth(vectors, queries, k)
    for recipe in recipes:
        started = time.perf_counter()
        index = build_index(vectors, recipe, wishes.seed)
        built = time.perf_counter() - started
        margins = margins_of(index, vectors, queries) if recipe.short else {}
        search = searcher(index, recipe, vectors, nprobe=min(1, recipe.lists), margins=margins)
        reason = faiss_reason(str(recipe), "float32", *vectors.shape)
        seen: set[int] = set()
        for target in sorted({*TARGETS, wishes.target}) if recipe.lists else (1.0,):
            recall = least_probes(search, recipe.lists, vectors, queries, true, target, source)
            if search.nprobe not in seen:
                seen.add(search.nprobe)
                taken = median_ms(search if reason else Certified(vectors), queries, k)
                weight = predict(len(vectors), vectors.shape[1], recipe)
                yield Point(str(recipe), search.nprobe, recall.mean, recall.p5, taken, built, weight)
        del index, search


def median_ms(searcher: Search, queries: Vectors, k: int) -> float:
    """The median milliseconds of single queries are returned; the first call only warms."""
    searcher.search(queries[:1], k)
    taken = []
    for query in range(len(queries)):
        started = time.perf_counter()
        searcher.search(queries[query : query + 1], k)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken)) * 1e3


def choose(points: Sequence[Point], wishes: Wishes, count: int, dims: int, source: str) -> Choice:
    """The quickest point that reaches the target is chosen. Raises TuneError, which names the nearest, if there is none."""
    good = [point for point in points if point.recall >= wishes.target]
    if not good:
        best = max(points, key=lambda point: point.recall)
        raise TuneError(f"no index reaches recall@{wishes.k} {wishes.target}: the best is {best.recipe} with {best.recall:.4f}")
    point = min(good, key=lambda one: one.p50_ms)
    if wishes.most_ms is not None and point.p50_ms > wishes.most_ms:
        raise TuneError(
            f"no index reaches recall@{wishes.k} {wishes.target} in {wishes.most_ms:g} ms: {point.recipe} needs "
            f"{point.p50_ms:.2f} ms; lower the recall or allow more time"
        )
    rows = training_rows(count, Recipe.parse(point.recipe))
    return Choice(point.recipe, wishes.k, wishes.target, wishes.seed, count, dims, rows, source, point)


def on_gpu(index: object, device: int = 0) -> object:
    """A copy of a FAISS index on a GPU is returned. Raises TuneError without faiss-gpu or without such a device.

    A copy without cuVS ignores selectors in silence: `Searcher` then withholds the answer (FilterIgnored).
    """
    import faiss as typed

    faiss = vars(typed)
    if "StandardGpuResources" not in faiss:
        raise TuneError("this FAISS has no GPU part: install the extra `gpu` (faiss-gpu) instead of `cpu`, or search on the CPU")
    if not 0 <= device < faiss["get_num_gpus"]():
        raise TuneError(f"GPU {device} is not there: FAISS sees {faiss['get_num_gpus']()}")
    copied: object = faiss["index_cpu_to_gpu"](faiss["StandardGpuResources"](), device, index)
    return copied
