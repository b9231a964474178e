"""Measures ways of finding the top k side by side: latency, throughput and recall on the same vectors and queries."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from index.exact import exact_search, overlap
from index.hits import Hits, Rows, Vectors

CENTRES, NOISE = 2_000, 0.7
CENTRE_SEED, ITEM_SEED, QUERY_SEED, SHIFT_SEED = 0, 1, 2, 3
_ROWS = 65_536
_APART = 11
_YARD = 1 << 18
Progress = Callable[[str, int, int], None]
Find = Callable[[Vectors, int], Rows]
"""The rows [Q, k] of the best, -1 where there are none, for queries [Q, D]."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is measured: `k` of each query, `batch` queries a call, `judged` of them for recall, `seconds` a setting."""

    k: int = 2_000
    batch: int = 1
    judged: int = 128
    seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One way with one setting."""

    name: str
    find: Find
    bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """An index that was built, with the seconds this took and all the settings it is measured with."""

    method: str
    seconds: float
    settings: list[Setting]


@dataclass(frozen=True, slots=True)
class Missing:
    """A method that cannot be measured here, and why."""

    method: str
    reason: str


Method = Callable[[Vectors], Iterable[Ready | Missing]]
"""Builds one index after the other; each may be freed before the next is built."""


@dataclass(slots=True)
class Row:
    """What was measured of one setting: milliseconds per call, queries per second, recall, memory of index and vectors.

    `yardstick_ms` is the median time of 262,144 square roots in one thread between its calls: where it differs from other
    rows', the machine was busy with something else; where it does not, something may still have sat on another core. A method
    that could not run has a `note` and nothing else.
    """

    method: str
    setting: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    qps: float | None = None
    recall_mean: float | None = None
    recall_p5: float | None = None
    bytes: int | None = None
    build_seconds: float | None = None
    calls: int = 0
    yardstick_ms: float | None = None
    note: str | None = None

    def plain(self) -> dict[str, object]:
        """The row as an object of JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Clock:
    """Times of one setting's calls and of the yardstick between them."""

    calls: list[float] = field(default_factory=list)
    yardsticks: list[float] = field(default_factory=list)


def made_items(count: int, dims: int) -> Vectors:
    """Vectors [N, D] are returned: a random one of 2,000 unit-normal centres plus 0.7 times unit noise, normalised."""
    return _made(count, dims, ITEM_SEED)


def made_queries(count: int, dims: int, shift: float) -> Vectors:
    """Queries [Q, D] of the same law and another seed are returned, moved by `shift` along one direction."""
    return shifted(_made(count, dims, QUERY_SEED), shift)


def shifted(queries: Vectors, shift: float) -> Vectors:
    """The queries are returned, each moved by `shift` along one direction that is the same for all: two towers never agree."""
    direction = np.random.default_rng(SHIFT_SEED).standard_normal(queries.shape[1])
    moved: Vectors = (queries + shift * direction / np.linalg.norm(direction)).astype(np.float32)
    return moved


def _made(count: int, dims: int, seed: int) -> Vectors:
    centres = np.random.default_rng(CENTRE_SEED).standard_normal((CENTRES, dims), dtype=np.float32)
    rng = np.random.default_rng(seed)
    vectors = np.empty((count, dims), np.float32)
    for start in range(0, count, _ROWS):
        part = vectors[start : start + _ROWS]
        part[:] = centres[rng.integers(0, CENTRES, len(part))] + np.float32(NOISE) * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def measure(vectors: Vectors, queries: Vectors, methods: list[Method], wishes: Wishes, progress: Progress) -> Iterator[Row]:
    """One row per method and setting is yielded as soon as its index is measured; the index is then freed.

    The settings of an index take turns call by call, so that a disturbance meets all of them.
    """
    judged = queries[: wishes.judged]
    progress("truth", 0, 1)
    truth = exact_search(vectors, judged, wishes.k)
    progress("truth", 1, 1)
    for ready in itertools.chain.from_iterable(method(vectors) for method in methods):
        if isinstance(ready, Missing):
            yield Row(ready.method, "absent", note=ready.reason)
            continue
        clocks = _take_turns(ready, queries, wishes, progress)
        for setting, clock in zip(ready.settings, clocks):
            yield _row(ready, setting, clock, wishes, _recall(vectors, judged, setting, truth, wishes))
        del ready, setting


def _take_turns(ready: Ready, queries: Vectors, wishes: Wishes, progress: Progress) -> list[_Clock]:
    clocks = [_Clock() for _ in ready.settings]
    spent = [0.0] * len(clocks)
    batches = [np.take(queries, range(at, at + wishes.batch), axis=0, mode="wrap") for at in range(0, len(queries), wishes.batch)]
    yard = np.ones(_YARD, np.float32)
    for turn in itertools.count():
        waiting = [place for place, seconds in enumerate(spent) if seconds < wishes.seconds or turn < 4]
        progress(ready.settings[0].name, len(clocks) - len(waiting), len(clocks))
        if not waiting:
            return clocks
        for place in waiting:
            # Of one thread: the workers of a matrix product go on spinning and would take a core from what is measured next.
            clocks[place].yardsticks.append(_seconds(lambda: np.sqrt(yard, out=yard)))
            # Another batch for each setting: what one has read must not lie in the cache for the next.
            batch = batches[(turn + _APART * place) % len(batches)]
            taken = _seconds(partial(ready.settings[place].find, batch, wishes.k))
            spent[place] += taken
            if turn:  # the first call warms
                clocks[place].calls.append(taken)
    raise AssertionError("unreachable")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _recall(vectors: Vectors, judged: Vectors, setting: Setting, truth: Hits, wishes: Wishes) -> Vectors:
    rows = np.concatenate([setting.find(judged[at : at + wishes.batch], wishes.k) for at in range(0, len(judged), wishes.batch)])
    # Rows that are there first: overlap reads as many as are counted.
    rows = np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)
    found = Hits(rows, np.zeros(rows.shape, np.float32), (rows >= 0).sum(axis=1).astype(np.int32))
    return overlap(vectors, judged, found, truth)


def _row(ready: Ready, setting: Setting, clock: _Clock, wishes: Wishes, recall: Vectors) -> Row:
    calls = np.array(clock.calls)
    return Row(
        method=ready.method,
        setting=setting.name,
        p50_ms=float(np.median(calls)) * 1e3,
        p99_ms=float(np.percentile(calls, 99)) * 1e3,
        qps=wishes.batch * len(calls) / float(calls.sum()),
        recall_mean=float(recall.mean()),
        recall_p5=float(np.percentile(recall, 5)),
        bytes=setting.bytes,
        build_seconds=ready.seconds,
        calls=len(calls),
        yardstick_ms=float(np.median(clock.yardsticks)) * 1e3,
    )


def machine() -> dict[str, object]:
    """Threads and processor features that the figures depend on."""
    import faiss

    return {
        "cores": len(os.sched_getaffinity(0)),
        "faiss_threads": faiss.omp_get_max_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "faiss_options": faiss.get_compile_options().strip(),
    }
