"""What answers for a snapshot: the certified scan where it is quicker than FAISS's own, by rules that the log states.

A Flat index promises the true top k, and the certified scan gives it from a quarter of the bytes: where the rules let it, FAISS's
file is not even read. Codes are made when the snapshot is opened (one core: .08 seconds for 50,000 x 128, 1.6 for 1,000,000), not
kept in it: a snapshot's files do not depend on how they are searched, and none can disagree with the vectors.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from weakref import WeakKeyDictionary

from index.certified import Certified
from index.codes import Codes
from index.exact import exact_search
from index.filters import Allow, check_filters
from index.gpu_code import gpu_reason
from index.gpu_scan import GpuExact
from index.hits import Hits, Rows, SearchError, Vectors
from index.int8 import MAX_DIMS, Crew, fastest_way
from index.kinds import as_recipe
from index.looks import How, Looks
from index.search import Search
from index.shards import joined, one_by_one
from index.shortlist import ShortLists
from index.snapshot import Snapshot

LEAST_ROWS = 30_000
"""With fewer, FAISS scores everything as quickly as survivors are found. Single queries, k = 2,000, one core, milliseconds of
certified / FAISS: 20,000 x 64 .91 / 1.00, 20,000 x 128 1.14 / 1.15, 30,000 x 384 2.55 / 2.53, 50,000 x 128 1.42 / 1.82."""

Device = Literal["cpu", "cuda"]
DEVICE_VARIABLE = "BREWLINE_SEARCH_DEVICE"
"""Where Flat snapshots are searched, "cpu" if it is not set: a GPU is not taken because it is there."""

_OPENED: WeakKeyDictionary[Snapshot, Serving] = WeakKeyDictionary()
_OPENING = threading.Lock()
"""A server opens a snapshot's changes anew when it becomes their writer; the codes are the same."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Twin:
    """The exact answers over vectors [N, D] that stay where they are, by `exact_search`: nothing is prepared, everything read."""

    vectors: Vectors

    @property
    def count(self) -> int:
        """N."""
        return len(self.vectors)

    @property
    def dims(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None) -> Hits:
        """As `Searcher.search`, and exact."""
        filters = check_filters(exclude, allow, len(queries), self.count)
        left_out = [one.excluded if one.allowed is None else (~one.set()).rows() for one in filters]
        return exact_search(self.vectors, queries, k, left_out)


def exact_twin(snapshot: Snapshot) -> Search:
    """The exact answers over a snapshot are given by what is returned, shard by shard if it is divided, without any copy."""
    return joined(snapshot, [Twin(shard.vectors) for shard in snapshot.shards])


@dataclass(frozen=True, slots=True)
class Serving:
    """What answers for a snapshot, `certified` or FAISS, and `why`, for the log and for `Info`."""

    searcher: Search
    certified: bool
    why: str
    looks: tuple[Looks, ...] = ()
    """Of the certified scans and short lists in it, one for each shard; FAISS's own ways look once."""

    def looked(self) -> dict[How, int]:
        """How its searches, one a query and shard, have ended since it was opened; nothing where no way of it looks again."""
        seen = [one.seen() for one in self.looks]
        return {how: sum(one[how] for one in seen) for how in seen[0]} if seen else {}

    @classmethod
    def of(cls, snapshot: Snapshot) -> Serving:
        """The quicker of the ways that give what the snapshot's recipe promises is opened once for an open snapshot, and logged.

        Raises SearchError for vectors that hold NaN or infinity, and where a GPU is asked for that cannot do it.
        """
        opened = _OPENED.get(snapshot)
        if opened is not None:  # without the lock: another snapshot may be being opened, and take its time
            return opened
        with _OPENING:
            if snapshot not in _OPENED:
                _OPENED[snapshot] = cls._open(snapshot)
            return _OPENED[snapshot]

    @classmethod
    def lend(cls, snapshot: Snapshot, searcher: Search, why: str) -> Serving:
        """`searcher` answers for an open snapshot, whoever opens its changes: its vectors are searched elsewhere."""
        with _OPENING:
            return _OPENED.setdefault(snapshot, cls(searcher, False, why))

    @classmethod
    def _open(cls, snapshot: Snapshot) -> Serving:
        facts, device = snapshot.manifest, search_device()
        reason = faiss_reason(facts.recipe, facts.dtype, facts.count, facts.dims, device)
        many = f"{len(facts.shards)} shards, each by " if facts.shards else ""
        if reason:
            each = scan_crew().each if many else one_by_one
            threads = 1 if many else scan_crew().threads
            opened = [as_recipe(shard, threads) for shard in snapshot.shards]
            looks = tuple(one.looks for one in opened if isinstance(one, ShortLists))
            found = cls(joined(snapshot, opened, each), False, f"{many}FAISS {facts.recipe}: {reason}", looks)
        elif device == "cuda":
            resident = [GpuExact(shard.vectors) for shard in snapshot.shards]
            held = sum(scan.bytes for scan in resident) / 2**20
            found = cls(joined(snapshot, resident), True, f"{many}certified scan of int8 codes on the GPU, {held:.0f} MiB of it")
        else:
            scans = [Certified(shard.vectors, crew=scan_crew()) for shard in snapshot.shards]
            held = sum(scan.bytes for scan in scans) / 2**20
            why = f"{many}certified scan of int8 codes, {held:.0f} MiB"
            found = cls(joined(snapshot, scans), True, why, tuple(scan.looks for scan in scans))
        log.info("snapshot %s is searched by: %s", snapshot.name, found.why)
        return found


@functools.cache
def scan_crew() -> Crew:
    """The threads that scan for all snapshots of this process: as many as torch has where they are asked for first.

    They have that thread's priority too, so whoever opens snapshots in a thread that steps back asks before it begins.
    """
    return Crew()


def search_device() -> Device:
    """The device that BREWLINE_SEARCH_DEVICE names is returned. Raises SearchError for another, and for a GPU not there."""
    asked = os.environ.get(DEVICE_VARIABLE) or "cpu"
    if asked not in get_args(Device):
        raise SearchError(f"{DEVICE_VARIABLE} is {asked!r}, expected cpu or cuda")
    if asked == "cpu":
        return "cpu"
    if reason := gpu_reason():
        raise SearchError(f"{DEVICE_VARIABLE} is cuda, but {reason}: unset it to search on the processor")
    return "cuda"


def faiss_reason(recipe: str, dtype: Codes, count: int, dims: int, device: Device = "cpu") -> str:
    """Why FAISS answers for a snapshot of `count` vectors of `dims` numbers is returned, "" if the certified scan does.

    On a GPU that was asked for neither the number of vectors nor the processor's int8 products matter.
    """
    if recipe != "Flat":
        return "the recipe asks for it"
    if dtype != "float32":
        return f"vectors are kept as {dtype}, the certified scan reads float32"
    if device == "cpu" and count < LEAST_ROWS:
        return f"{count:,} vectors, below {LEAST_ROWS:,} it is as quick"
    if dims > MAX_DIMS:
        return f"{dims} dims, the certified scan takes {MAX_DIMS}"
    if device == "cpu" and fastest_way(dims) != "int8":
        return "this processor multiplies int8 wrongly or slowly"
    return ""
