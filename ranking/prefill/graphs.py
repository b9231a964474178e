"""Small passes run over buffers of fixed place and size, on a GPU as CUDA graphs: one launch instead of hundreds.

A pass is padded to a bucket (powers of two for rows and known keys, of four for items and the longest one), its inputs are copied
into the bucket's own buffers, and what was recorded there once runs again. On a CPU "run again" is a call of the same function on
the same buffers, so everything but the recording itself is tested there. A pass that fits no bucket, or whose buffers find no
memory, goes the plain way, and is counted with the reason.

Legend: T packed rows, P prefix tokens, n items.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ranking.prefill.cache import Keys
from ranking.prefill.lean import Entries, Lean, Packed
from ranking.prefill.plan import Chunk
from ranking.prefill.seats import PlacedAttend, Seats, placed
from ranking.prefill.weights import Weights

log = logging.getLogger(__name__)

ROWS, KNOWN, REQUESTS = 2_048, 4_096, 8
"""The most rows, known keys and requests of one recorded pass; more rows fill a GPU without it."""
LEAST_ROWS, LEAST_ITEMS, LEAST_LENGTH = 64, 8, 32
GRAPHS = 32
"""Recorded passes that are kept at most."""
WARM_UPS = 3

Ints = npt.NDArray[np.int64]
Reason = Literal["rows", "known keys", "requests", "history", "bytes"]


@dataclass
class GraphStats:
    """Counts since the engine took its weights: passes recorded, run from a recording and dropped for others; bytes of the
    buffers held now (a CUDA graph's own memory comes on top); passes that went the plain way, by reason: too many "rows",
    "known keys" or "requests", a "history" whose entries do not see each other, buffers of more "bytes" than all may have or than
    the device has left."""

    recorded: int = 0
    replayed: int = 0
    evicted: int = 0
    bytes: int = 0
    plain: Counter[Reason] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Room for T `rows`, `items` (0: a prefix pass), tokens of the `longest` item, `known` keys (0: a prefix from nothing)."""

    rows: int
    items: int
    longest: int
    known: int


class Recording:
    """One pass of a bucket's size over its own buffers: x, angles, last rows, keys and bounds go in, keys or states come out."""

    def __init__(self, plain: Lean, bucket: Bucket, attend: PlacedAttend) -> None:
        weights = plain.weights
        like, dims = weights.embedding, weights.dims
        self.bucket, self._plain = bucket, plain
        self.x = like.new_zeros(bucket.rows, weights.hidden)
        self._angles = like.new_zeros(bucket.rows, 1, dims), like.new_zeros(bucket.rows, 1, dims)
        self._last = torch.zeros(bucket.items, dtype=torch.int64, device=like.device)
        held = bucket.known + (0 if bucket.items else bucket.rows)
        self.keys = Keys.empty(np.empty(0, np.int64), len(weights.blocks), held, weights.kv_heads, dims, like)
        self.keys.tensor.zero_()
        self.keys.length = held
        places = (bucket.items, REQUESTS, bucket.longest) if bucket.items else (1, 1, bucket.rows)
        self._seats = Seats(plain.attention.name, attend, places, like.device)
        self._lean = Lean(weights, self._seats)
        self._replay: Callable[[], Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        own = (self.x, *self._angles, self._last, self.keys.tensor, self._seats.numbers)
        return sum(part.numel() * part.element_size() for part in own) + self._lean.bytes

    def extend(self, tokens: Ints, prefix: Keys) -> Tensor:
        """The keys and values of `tokens` [t] follow those that `prefix` holds; returns them [layers, 2, t, G, D]."""
        start, rows = prefix.length, len(tokens)
        own, seen = (np.array([0, count], np.int32) for count in (rows, start))

        def enter() -> None:
            self._enter(tokens, np.arange(start, start + rows), None)
            self.keys.tensor[:, :, :start].copy_(prefix.tensor[:, :, :start])
            self._seats.seat(own, own, own, seen)

        self._run(enter)
        first = self.bucket.known
        made = self.keys.tensor[:, :, first : first + rows]
        prefix.tensor[:, :, start : start + rows].copy_(made)
        prefix.length = start + rows
        return made

    def read(self, chunk: Chunk, prefixes: Sequence[Keys], vectors: Tensor | None) -> Tensor:
        """The hidden states [n, hidden] at the items' last tokens; the next pass of this bucket overwrites them."""
        items = np.cumsum([0, *(piece.items for piece in chunk.pieces)], dtype=np.int32)
        seen = np.cumsum([0, *(prefix.length for prefix in prefixes)], dtype=np.int32)

        def enter() -> None:
            self._enter(chunk.tokens, chunk.positions, vectors)
            self._last[: len(chunk.last)].copy_(torch.from_numpy(chunk.last))
            for first, prefix in zip(seen.tolist(), prefixes):
                self.keys.tensor[:, :, first : first + prefix.length].copy_(prefix.tensor[:, :, : prefix.length])
            self._seats.seat(chunk.item_bounds, chunk.item_bounds[items], items, seen)

        return self._run(enter)[: len(chunk.last)]

    def _enter(self, tokens: Ints, positions: Ints, vectors: Tensor | None) -> None:
        self.x[: len(tokens)].copy_(self._plain.embed(tokens, vectors))
        self.x[len(tokens) :].zero_()
        self._last.zero_()
        for mine, new in zip(self._angles, self._plain.angles(positions)):
            mine[: len(tokens)].copy_(new)

    def _run(self, enter: Callable[[], None]) -> Tensor:
        """What was recorded has run on what `enter` copies in; recorded at the first call, which spoils the inputs."""
        enter()
        if self.x.device.type != "cuda":
            return self._pass()  # to keep the method would be a cycle, and a dropped recording would wait for the collector
        if self._replay is None:
            self._replay = captured(self._pass, self.x.device)
            enter()
        return self._replay()

    def _pass(self) -> Tensor:
        if self.bucket.items:
            packed = Packed(self.x, self._angles, self._last, self.bucket.rows, self.bucket.items, (), ())
            return self._lean.through(packed, [self.keys])
        self._lean.fill(self.x, self._angles, self.keys, self.bucket.known, self.bucket.rows)
        return self.x


class Recorded:
    """A `Lean` whose small passes run from recordings, least recently used out first, within bytes and a number."""

    def __init__(self, plain: Lean, budget: int) -> None:
        """Raises BackendMissing if the attention in use cannot be recorded on this device."""
        self.weights, self.stats, self._plain, self._budget = plain.weights, GraphStats(), plain, budget
        self._attend = placed(plain.attention.name, plain.weights.embedding.device)
        self._held: OrderedDict[Bucket, Recording] = OrderedDict()
        self._sizes: dict[Bucket, int] = {}
        self._too_large: set[Bucket] = set()

    def capacity(self, rows: int) -> int:
        """See Lean."""
        return self._plain.capacity(rows)

    def extend(self, tokens: Ints, prefix: Keys, entries: Entries | None = None) -> None:
        """See Lean."""
        known = _room(prefix.length, LEAST_ROWS) if prefix.length else 0
        bucket = Bucket(_room(len(tokens), LEAST_ROWS), 0, 0, known)
        if self._ran(bucket, 1, "history" if entries else None, lambda one: one.extend(tokens, prefix)) is None:
            self._plain.extend(tokens, prefix, entries)

    def read(self, chunk: Chunk, prefixes: Sequence[Keys], vectors: Tensor | None) -> Tensor:
        """See Lean; the answer is good until the next call."""
        items = _room(len(chunk.last), LEAST_ITEMS, 4)
        longest = _room(int(np.diff(chunk.item_bounds).max()), LEAST_LENGTH, 4)
        known = _room(sum(prefix.length for prefix in prefixes), LEAST_ROWS)
        bucket = Bucket(_room(max(len(chunk.tokens), items + 1), LEAST_ROWS), items, longest, known)
        found = self._ran(bucket, len(chunk.pieces), None, lambda one: one.read(chunk, prefixes, vectors))
        return self._plain.read(chunk, prefixes, vectors) if found is None else found

    def _ran(self, bucket: Bucket, requests: int, reason: Reason | None, run: Callable[[Recording], Tensor]) -> Tensor | None:
        """What `run` returns of the bucket's recording, new if there is none; None, counted, if the pass has to go the plain way.

        A recording that fails is forgotten, and one that found no memory is not tried again.
        """
        reason = self._against(bucket, requests) or reason
        if reason is None:
            try:
                if bucket not in self._held:
                    self._held[bucket] = Recording(self._plain, bucket, self._attend)
                found = run(self._held[bucket])
                self._settle(bucket)
                return found
            except BaseException as error:
                self._drop(bucket)
                # A capture that had to end early fails once more as it is closed.
                if not any(isinstance(seen, torch.OutOfMemoryError) for seen in (error, error.__context__)):
                    raise
                log.warning("no memory for %s (%s); such passes go the plain way", bucket, error)
                self._too_large.add(bucket)
                reason = "bytes"
        self.stats.plain[reason] += 1
        return None

    def _against(self, bucket: Bucket, requests: int) -> Reason | None:
        """Why a pass is too large to be recorded, None if it is not."""
        if bucket.rows > ROWS:
            return "rows"
        if bucket.known > KNOWN:
            return "known keys"
        if requests > REQUESTS:
            return "requests"
        return "bytes" if bucket in self._too_large or least_bytes(self.weights, bucket) > self._budget else None

    def _settle(self, bucket: Bucket) -> None:
        """After its first run a recording is measured: all are within bytes and number again, and one that is too large alone is
        not made a second time."""
        self.stats.replayed += 1
        self._held.move_to_end(bucket)
        if bucket in self._sizes:
            return
        self.stats.recorded += 1
        size = self._sizes[bucket] = self._held[bucket].bytes
        if size > self._budget:
            log.warning("%s holds %d bytes of %d at most; such passes go the plain way", bucket, size, self._budget)
            self._too_large.add(bucket)
            self._held.move_to_end(bucket, last=False)
        while sum(self._sizes.values()) > self._budget or len(self._held) > GRAPHS:
            self._drop(next(iter(self._held)))
            self.stats.evicted += 1
        self.stats.bytes = sum(self._sizes.values())

    def _drop(self, bucket: Bucket) -> None:
        self._held.pop(bucket, None)
        self._sizes.pop(bucket, None)
        self.stats.bytes = sum(self._sizes.values())


def least_bytes(weights: Weights, bucket: Bucket) -> int:
    """Bytes that a recording takes for what goes in and for keys and values; those of the layers' buffers come on top."""
    held = bucket.known + (0 if bucket.items else bucket.rows)
    numbers = bucket.rows * (weights.hidden + 2 * weights.dims)
    numbers += 2 * len(weights.blocks) * held * weights.kv_heads * weights.dims
    return numbers * weights.embedding.element_size()


def captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A CUDA graph that runs `run` again on the tensors that it works on. It has never run.

    `run` must wait for the host nowhere. Other threads may use the device meanwhile. The graph keeps the memory of what `run`
    returns. Whatever happens, the stream in use is afterwards the one that was.
    """
    with torch.cuda.device(device):
        before, side, graph = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        side.wait_stream(before)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run()
            before.wait_stream(side)
            # A stream of its own: the class's default one is of whatever device was current when it was first made.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                found = run()
        finally:
            torch.cuda.set_stream(before)  # `graph` does not give it back where closing the capture fails

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return found

    return replay


def _room(count: int, least: int, step: int = 2) -> int:
    """`least` times a power of `step`, the smallest that holds `count`."""
    while least < count:
        least *= step
    return least
