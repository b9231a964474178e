"""A new stack is loaded and warmed beside the one that answers, on one thread that leaves the cores to requests.

Measured on 2 cores that other work kept busy, tiny models, 6 to 12 swaps in a row: p99 of Recommend from the move of the pointer
until 0.3 s after the first new answer, over that of the rest: night and models 2.0, with the lower priority 1.4 to 1.5; the night
alone 1.0 to 1.1 either way, up to 1.6 without the short turns. With a garbage collection after each: 29 and 24.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from index.search import one_core_here
from index.serving import scan_crew
from index.snapshot import Snapshot
from ranking.pace import Pace
from ranking.serving.stack import PROBE, WARM_CANDIDATES, Stack, load_stack
from retrieval.attributes import ATTRIBUTES, Wanted

PAGE = 4_096
NICE = 15
SWITCH_S = 1e-4
"""How long Python lets a thread run on while another one waits. Loading is Python too, and a request asks for its turn after each
of some hundred operations: at the default of 5 ms it would stand still for as long as loading takes."""
LEAVE_S = 0.5
"""How long a process that ends waits for a loader that has nothing more to do."""
T = TypeVar("T")


class Loader(threading.Thread):
    """One thread for loading, of low priority, in which torch and FAISS use one core. All other threads keep theirs.

    The process does not wait for it to end: see `leave`.
    """

    def __init__(self) -> None:
        super().__init__(name="brewline-swap", daemon=True)
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        scan_crew()  # threads that the loader begins would have its priority, and be as many as it has cores: one

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """The work is done after what was given before, once the thread was started."""
        future: Future[T] = Future()
        self._jobs.put((future, work))
        return future

    def close(self) -> None:
        """The thread ends after what was given to it and not cancelled."""
        self._jobs.put(None)

    def run(self) -> None:
        """What the thread does."""
        _step_back()
        while (job := self._jobs.get()) is not None:
            _settle(*job)
            del job  # while it waits it holds no stack


def leave() -> None:
    """Nothing happens, unless a loader is still at work in this process: then the process is over, with status 0.

    Python would unwind a thread that is inside torch, which may abort. What is being loaded is nobody's yet.
    """
    for thread in threading.enumerate():
        if not isinstance(thread, Loader):
            continue
        thread.join(LEAVE_S)
        if thread.is_alive():
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
        del future  # else the error's frames would hold the error


def _step_back() -> None:
    import torch

    # OpenMP keeps the number for each thread; torch hands the last one that was set to threads that begin, so it is set back
    # from another thread, which leaves this one alone.
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    back = threading.Thread(target=torch.set_num_threads, args=(cores,))
    back.start()
    back.join()
    one_core_here()
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def load_beside(before: Stack) -> Stack:
    """What the source of `before` holds now, verified and warm, in the thread of `loader`. Raises as `load_stack` does.

    Objects that both stacks share are not asked anything: they are for the thread that answers.
    """
    with _short_turns():
        fresh = load_stack(before.origin.source, before)
        if same(fresh, before):
            return fresh
        try:
            if fresh.origin.encoder is not before.origin.encoder:
                fresh.encoder.members([PROBE])
                fresh.today.prepare()
            _warm(fresh, ranker=fresh.ranker is not before.ranker)
        except BaseException:
            fresh.today.close()
            raise
        return fresh


def same(fresh: Stack, before: Stack) -> bool:
    """Whether two stacks give the same answers, so that there is nothing to exchange."""
    night = fresh.snapshot.name == before.snapshot.name and fresh.encoder.fingerprint == before.encoder.fingerprint
    return night and fresh.ranker is before.ranker


def free(held: list[Stack]) -> None:
    """The stacks in the list are closed, and gone if nobody else holds them; the list is empty.

    Nothing in a stack holds itself, so its memory returns at once and the collector, which stops every thread, is not asked.
    """
    for stack in held:
        stack.today.close()
    held.clear()


def _warm(fresh: Stack, *, ranker: bool) -> None:
    """Every page of the vectors is mapped, and filters, search and, if it is new, the ranker have run once."""
    _touch(fresh.snapshot)
    recommender = fresh.now().recommender
    vector = np.array(fresh.snapshot.vectors_at(np.zeros(1, np.int64))[0], np.float32)
    for name in (*ATTRIBUTES, *recommender.retriever.catalog.columns.facets):
        recommender.retriever.catalog.attribute(name).rows([""])
    nobody = Wanted(blocked_creators=frozenset({"nobody"}))
    recommender.retrieve(PROBE, WARM_CANDIDATES, vector=vector, wanted=nobody)
    found = recommender.retrieve(PROBE, WARM_CANDIDATES, vector=vector)
    if ranker and fresh.ranker is not None:
        # On one core it is slower than a request will be, so this one is no measure of the pace.
        replace(recommender, pace=Pace()).score(PROBE, found.rows, vector=vector)


def _touch(snapshot: Snapshot) -> None:
    """The vectors are in memory, and a request that reads one waits for no disk; as far as there is room."""
    for shard in snapshot.shards:
        bytes_of = shard.vectors.reshape(-1).view(np.uint8)
        for start in range(0, len(bytes_of), 1 << 26):
            bytes_of[start : start + (1 << 26) : PAGE].max()


@contextmanager
def _short_turns() -> Iterator[None]:
    """Threads take turns at Python more often inside the block."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
