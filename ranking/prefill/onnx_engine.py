"""Scores many items after each prefix with onnxruntime alone: what `ranking.prefill.engine` computes, where there is no torch.

A folder as `ranking.prefill.onnx_graphs.export_engine` writes it is verified whole, then opened. Requests are planned as for the
torch engine; the items of one request pass in groups of at most `limits.max_tokens` rows over its prefix's keys and values, which
stay in a small cache. A quantized folder is refused until `ranking.prefill.onnx_gate.quality_gate` has admitted it.

In int8 the rows of a pass share the scale of their activations, so there a score depends slightly on its neighbours; in float32
it does not.

Legend: T rows of a pass, P prefix tokens, n items, G key heads, D dims of a head.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ranking.prefill.errors import BadHistory, UnknownToken, UnknownVector
from ranking.prefill.onnx_folder import RESULT, NotAdmitted, open_folder, refusal
from ranking.prefill.plan import Chunk, plan
from ranking.prefill.request import Limits, Request

ROWS = 512
"""Rows of one pass: enough for fast products, few enough that the mask of T x (P + T) stays small."""
CACHE_BYTES = 256 << 20

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class OnnxEngine:
    """Multi-item scoring over an exported folder, on the CPU. Safe for concurrent calls."""

    backend = "onnx"

    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits | None = None,
        cache_bytes: int = CACHE_BYTES,
        threads: int = 0,
        on_trial: bool = False,
    ) -> None:
        """`limits.max_tokens` bounds the rows of a pass; `threads` 0 means one for each core; with `on_trial` a quantized engine
        opens without a passed gate, so that the gate can measure it. Raises EngineFolderError and NotAdmitted.
        """
        self.folder = folder
        self.facts, (self._prefix, self._items) = open_folder(folder, threads)
        if not on_trial and (why := refusal(self.facts)):
            raise NotAdmitted(f"{folder} is not admitted: {why}")
        self.label_ids = self.facts.labels
        limits = limits or Limits(max_tokens=ROWS)
        known = self.facts.max_positions
        self.limits = replace(limits, max_positions=min(known, limits.max_positions or known))
        self.prefixes = PrefixShelf(cache_bytes)

    def score(self, requests: Sequence[Request]) -> list[Floats]:
        """Return for each request the logits float32 [N, labels] at the last token of its N items, in input order.

        Each row is what the model says about `prefix + item` alone. Raises the errors of `plan`, UnknownToken, and UnknownVector
        for a request with vectors, which the graphs do not take.
        """
        planned = plan(requests, replace(self.limits, max_tokens=sys.maxsize), apart=True)  # rows are cut by request, below
        if planned.histories:
            raise BadHistory("this engine lets every history entry see the others; score such requests with the torch engine")
        if planned.vectors is not None:
            raise UnknownVector("an exported engine reads words only; score items of vectors with the torch engine")
        self._check(planned.prefixes.values())
        self._check(chunk.tokens for chunk in planned.chunks)
        logits = np.empty((planned.unique_items, len(self.label_ids)), np.float32)
        for chunk in planned.chunks:
            first = 0
            for piece in chunk.pieces:
                past = self._keys(planned.prefixes[piece.request])
                for start, stop in groups(chunk.item_bounds, first, first + piece.items, self.limits.max_tokens):
                    logits[chunk.unique[start:stop]] = self._read(chunk, start, stop, past)
                first += piece.items
        return [logits[rows] for rows in planned.fan_out]

    def _read(self, chunk: Chunk, start: int, stop: int, past: Floats) -> Floats:
        """The logits [n, labels] of some items of one request in one pass."""
        bounds = chunk.item_bounds[start : stop + 1].astype(np.int64)
        rows = slice(int(bounds[0]), int(bounds[-1]))
        feeds = {
            "ids": chunk.tokens[rows],
            "positions": chunk.positions[rows],
            "items": np.repeat(np.arange(stop - start), np.diff(bounds)),
            "past": past,
            "last": bounds[1:] - bounds[0] - 1,
        }
        return np.asarray(self._items.run([RESULT], feeds)[0], np.float32)

    def _keys(self, tokens: Ints) -> Floats:
        """A prefix's keys and values [P, layers, 2, G, D], found or computed.

        Rows come first, so that what is known so far is one piece of memory that a pass reads where it lies.
        """
        found = self.prefixes.find(tokens)
        if found is not None:
            return found
        made = np.empty((len(tokens), self.facts.layers, 2, self.facts.kv_heads, self.facts.dims), np.float32)
        for first in range(0, len(tokens), self.limits.max_tokens):
            some = tokens[first : first + self.limits.max_tokens]
            feeds = {"ids": some, "positions": np.arange(first, first + len(some)), "past": made[:first]}
            made[first : first + len(some)] = self._prefix.run([RESULT], feeds)[0]
        self.prefixes.keep(tokens, made)
        return made

    def _check(self, parts: Iterable[Ints]) -> None:
        highest = max((int(tokens.max()) for tokens in parts), default=0)
        if highest >= self.facts.vocabulary:
            raise UnknownToken(f"token id {highest} is outside the model's vocabulary of {self.facts.vocabulary}")


class PrefixShelf:
    """Keys and values of whole prefixes by their tokens, least recently used out first. Safe for concurrent calls.

    `hits` and `misses` count the prefixes asked for.
    """

    def __init__(self, budget: int) -> None:
        """`budget` in bytes; 0 keeps nothing."""
        self.budget, self.bytes, self.hits, self.misses = budget, 0, 0, 0
        self._entries: OrderedDict[bytes, Floats] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, tokens: Ints) -> Floats | None:
        """The keys and values of exactly these tokens, or None."""
        with self._lock:
            found = self._entries.get(name := tokens.tobytes())
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(name)
            return found

    def keep(self, tokens: Ints, keys: Floats) -> None:
        """They are found from now on, unless they alone exceed the budget."""
        with self._lock:
            name = tokens.tobytes()
            if name in self._entries or keys.nbytes > self.budget:
                return
            self._entries[name] = keys
            self.bytes += keys.nbytes
            while self.bytes > self.budget:
                self.bytes -= self._entries.popitem(last=False)[1].nbytes


def groups(bounds: npt.NDArray[np.int32], start: int, end: int, rows: int) -> Iterator[tuple[int, int]]:
    """Items start..end in groups of at most `rows` rows, or of one item that is longer."""
    while start < end:
        fits = int(np.searchsorted(bounds, int(bounds[start]) + rows, side="right")) - 1
        stop = min(end, max(start + 1, fits))
        yield start, stop
        start = stop
