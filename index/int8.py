"""Products of int8 vectors with exact int32 results, by the fastest way that this machine computes correctly."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from index.hits import Rows, Vectors

Bytes = npt.NDArray[np.int8]
Sums = npt.NDArray[np.int32]
T = TypeVar("T")
R = TypeVar("R")
Way = Literal["int8", "float32"]
LEVELS = 127
"""Codes span -127..127: with -128 left out a sign can be turned without overflow."""
MAX_DIMS = 1024
"""Up to here every partial sum of products of codes is a whole number that float32 holds."""
_WAYS: tuple[Way, ...] = ("int8", "float32")
_TRIES = 12
_CLEARLY = 2.0


def encode(vectors: Vectors, scale: float) -> Bytes:
    """The vectors [..., D] in steps of `scale`, rounded and cut at the ends, are returned as int8 [..., code_dims(D)]."""
    codes = np.zeros((*vectors.shape[:-1], code_dims(vectors.shape[-1])), np.int8)
    codes[..., : vectors.shape[-1]] = np.clip(np.rint(vectors * np.float32(1 / scale)), -LEVELS, LEVELS)
    return codes


def code_dims(dims: int) -> int:
    """The dims of codes is returned: filled with zeros to a multiple of 4. torch's product of single columns is wrong."""
    return -(-dims // 4) * 4


def scale_of(vectors: Vectors) -> float:
    """The smallest step with which every number of these vectors can be encoded is returned; never 0."""
    return max(float(np.abs(vectors).max(initial=0.0)) / LEVELS, float(np.finfo(np.float32).tiny) * 2**24)


def products(left: Bytes, right: Bytes, out: Sums, way: Way) -> None:
    """out int32 [Q, R] = left [Q, D] times right [R, D]; whatever the way, the results are exact up to MAX_DIMS dims."""
    import torch

    if way == "int8":
        torch._int_mm(torch.from_numpy(left), torch.from_numpy(right).T, out=torch.from_numpy(out))
    else:
        out[...] = left.astype(np.float32) @ right.astype(np.float32).T


def top_of_products(queries: Vectors, vectors: Vectors, k: int) -> Rows:
    """The rows [Q, k] of the largest float32 products, best first, are returned: torch's matmul and topk."""
    import torch

    scores = torch.from_numpy(queries) @ torch.from_numpy(vectors).T
    rows: Rows = torch.topk(scores, min(k, len(vectors)))[1].numpy()
    return rows


@functools.cache
def fastest_way(dims: int) -> Way:
    """How codes of `dims` are multiplied on this machine is returned: int8 unless it is wrong or half as fast, which is logged.

    Processors without dot-product instructions may saturate sums of int8 products: extreme codes are tried first. One slow
    moment must not decide for the life of a process, so the ways take turns, and float32 has to be clearly the faster one.
    """
    rng = np.random.default_rng(0)
    left, right = (rng.choice(np.array([-127, -1, 0, 127], np.int8), (rows, code_dims(dims))) for rows in (64, 4096))
    left[0], right[:2] = LEVELS, [[LEVELS], [-LEVELS]]
    right_ways = [way for way in _WAYS if _is_right(way, left, right)]
    seconds = dict.fromkeys(right_ways, np.inf)
    out = np.empty((len(left), len(right)), np.int32)
    for way in right_ways * _TRIES:
        started = time.perf_counter()
        products(left, right, out, way)
        seconds[way] = min(seconds[way], time.perf_counter() - started)
    best: Way = "int8" if seconds.get("int8", np.inf) <= _CLEARLY * seconds["float32"] else "float32"
    if best != "int8":
        logging.getLogger(__name__).warning("int8 products are wrong or slow here, float32 is used: %s", seconds)
    return best


def _is_right(way: Way, left: Bytes, right: Bytes) -> bool:
    out = np.empty((len(left), len(right)), np.int32)
    try:
        products(left, right, out, way)
    except (RuntimeError, NotImplementedError, AttributeError):
        if way == "float32":
            raise
        return False
    return bool((out == left.astype(np.int64) @ right.T.astype(np.int64)).all())


def _compute_alone() -> None:
    import faiss
    import torch

    faiss.omp_set_num_threads(1)
    torch.get_num_threads()  # else the first computation of this thread would take what was last set for all over what it has
    torch.set_num_threads(1)


class Crew:
    """Threads that each compute with one: a small product is not worth the waking of a second thread."""

    def __init__(self, threads: int | None = None) -> None:
        import torch

        self.threads = threads or torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        if self.threads > 1:
            before = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(self.threads, "scan", initializer=_compute_alone)
            list(self._pool.map(time.sleep, [0.01] * self.threads))
            torch.set_num_threads(before)

    def each(self, task: Callable[[T], R], jobs: list[T]) -> list[R]:
        """The results of all jobs are returned, in order."""
        if self._pool is None or len(jobs) < 2:
            return [task(job) for job in jobs]
        return list(self._pool.map(task, jobs))

    def apart(self, task: Callable[[], R]) -> R:
        """The result of a task that one of the threads computes, so that none of the caller's own spins on beside what is next.

        Not for tasks of this crew: they would wait for each other.
        """
        return task() if self._pool is None else self._pool.submit(task).result()

    def shares(self, count: int) -> list[range]:
        """0..count - 1 cut into one run per thread, none empty."""
        if self.threads == 1:
            return [range(count)] if count else []
        edges = np.linspace(0, count, min(self.threads, max(count, 1)) + 1).astype(int).tolist()
        return [range(low, high) for low, high in itertools.pairwise(edges) if low < high]
