"""Scores many items after each prefix with onnxruntime alone: what `ranking.prefill.engine` computes, where there is no torch.

A folder as `ranking.prefill.onnx_graphs.export_engine` writes it is verified whole, then opened. Requests are planned as for the
torch engine; the items of one request pass in groups of at most `limits.max_tokens` rows over its prefix's keys and values, which
stay in a small cache. A quantized folder is refused until `ranking.prefill.onnx_gate.quality_gate` has admitted it.

In int8 the rows of a pass share the scale of their activations, so there a score depends slightly on its neighbours; in float32
it does not.

Legend: T rows of a pass, P prefix tokens, n items, G key heads, D dims of a head.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from index.durable import sha256_of
from index.errors import BrewlineError
from ranking.prefill.errors import UnknownToken, UnknownVector
from ranking.prefill.plan import Chunk, Limits, Request, plan

FORMAT = 1
FACTS, WEIGHTS = "engine.json", "weights.bin"
GRAPHS = ("prefix.onnx", "items.onnx")
RESULT = "result"
ROWS = 512
"""Rows of one pass: enough for fast products, few enough that the mask of T x (P + T) stays small."""
CACHE_BYTES = 256 << 20

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class EngineFolderError(BrewlineError):
    """A folder is not a complete exported engine of this version."""


class NotAdmitted(BrewlineError):
    """A quantized engine has not passed the gate that compares it with its original."""


@dataclass(frozen=True)
class EngineFacts:
    """What `engine.json` says. `labels` token ids in the order of the logits; `revision` a sha256 of the exported weights;
    `files` name -> sha256; `gate` the numbers of the last `quality_gate`, None before the first."""

    format: int
    labels: tuple[int, ...]
    layers: int
    heads: int
    kv_heads: int
    dims: int
    hidden: int
    vocabulary: int
    max_positions: int
    revision: str
    quantized: bool
    files: Mapping[str, str]
    gate: Mapping[str, Any] | None


def read_facts(folder: Path) -> EngineFacts:
    """The facts of an exported folder, every file of which has the content that they name. Raises EngineFolderError."""
    path = folder / FACTS
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        seen = found["format"]
        if seen == FORMAT:
            facts = EngineFacts(**{part.name: found[part.name] for part in fields(EngineFacts)})
            facts = replace(facts, labels=tuple(map(int, facts.labels)), files=dict(facts.files))
            _check_numbers(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineFolderError(
            f"{path}: not the facts of an exported engine ({type(error).__name__}: {error}); export it again"
        ) from error
    if seen != FORMAT:
        raise EngineFolderError(f"{path}: format {seen!r}, this version reads {FORMAT}; export it again")
    for name in (*GRAPHS, WEIGHTS):
        here = sha256_of(folder / name) if (folder / name).is_file() else "missing"
        if here != facts.files.get(name):
            raise EngineFolderError(f"{folder / name}: sha256 {here}, {FACTS} says {facts.files.get(name)}; export it again")
    return facts


def _check_numbers(facts: EngineFacts) -> None:
    sizes = (facts.layers, facts.heads, facts.kv_heads, facts.dims, facts.hidden, facts.vocabulary, facts.max_positions)
    if not all(type(size) is int and size > 0 for size in sizes) or not facts.labels or type(facts.quantized) is not bool:
        raise ValueError("a size is not a positive number, there is no label, or it is not said whether it is quantized")


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
        self.folder, self.facts = folder, read_facts(folder)
        gate = self.facts.gate
        if self.facts.quantized and not on_trial and not (gate and gate.get("passed") is True):
            raise NotAdmitted(f"{folder} is quantized and has not passed quality_gate (seen: {gate}); run the gate on it")
        self.label_ids = self.facts.labels
        limits = limits or Limits(max_tokens=ROWS)
        known = self.facts.max_positions
        self.limits = replace(limits, max_positions=min(known, limits.max_positions or known))
        self.prefixes = PrefixShelf(cache_bytes)
        self._prefix, self._items = (_session(folder / name, threads) for name in GRAPHS)

    def score(self, requests: Sequence[Request]) -> list[Floats]:
        """Return for each request the logits float32 [N, labels] at the last token of its N items, in input order.

        Each row is what the model says about `prefix + item` alone. Raises the errors of `plan`, UnknownToken, and UnknownVector
        for a request with vectors, which the graphs do not take.
        """
        planned = plan(requests, replace(self.limits, max_tokens=sys.maxsize), apart=True)  # rows are cut by request, below
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
        """A prefix's keys and values [layers, 2, P, G, D], found or computed."""
        found = self.prefixes.find(tokens)
        if found is not None:
            return found
        made = np.empty((self.facts.layers, 2, 0, self.facts.kv_heads, self.facts.dims), np.float32)
        for first in range(0, len(tokens), self.limits.max_tokens):
            some = tokens[first : first + self.limits.max_tokens]
            feeds = {"ids": some, "positions": np.arange(first, first + len(some)), "past": made}
            made = np.concatenate([made, self._prefix.run([RESULT], feeds)[0]], axis=2)
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


def _session(path: Path, threads: int) -> Any:
    # Read when onnxruntime is first imported: without it, it writes a device id and calls home from native code.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # a plan of memory is kept for every shape it has seen, and here nearly every shape is new
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class; the cause is kept
        version = onnxruntime.__version__
        raise EngineFolderError(f"{path}: onnxruntime {version} cannot open it ({error}); export it again") from error
