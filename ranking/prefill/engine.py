"""Scores many items after each prefix in as few passes as the token budget allows, and reads only the labels' logits.

Prefixes become keys and values once and stay in a cache; items are packed over them. `Engine.prefill` warms a member's prefix
while retrieval still runs. With `deterministic` a score is the same bit for bit whatever the neighbours, their order, the
chunking, the batch and the state of the cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ranking.prefill.attend import BackendMissing, choose
from ranking.prefill.cache import BLOCK, CacheStats, Keys, PrefixCache
from ranking.prefill.cascade import Attention, Cascade
from ranking.prefill.errors import UnknownToken, UnknownVector
from ranking.prefill.graphs import GraphStats, Recorded
from ranking.prefill.history import marked, stages, whole_entries
from ranking.prefill.lean import Lean
from ranking.prefill.llama import Layers, cascade
from ranking.prefill.plan import Plan, plan
from ranking.prefill.request import Limits, Request, check_history, check_labels, check_prefix
from ranking.prefill.steady import Steady
from ranking.prefill.weights import Weights, arithmetic_of, check_family, longest_text, state_of

log = logging.getLogger(__name__)

Logits = npt.NDArray[np.float32]
TILE = 256
"""Rows of every matrix product in deterministic mode."""
CACHE_BYTES = {True: 1 << 30, False: 4 << 30}
"""Bytes of kept prefixes, on a CPU and elsewhere (a prefix of 1,024 tokens of a 3B model holds 112 MiB)."""
PASS_ROWS = {True: 8_192, False: 32_768}
"""Tokens of one pass, on a CPU and elsewhere."""


class Engine:
    """Multi-item scoring over one Hugging Face model of the LLaMA family, whose weights it shares.

    `backend` names the attention in use, `loop` the layer loop ("lean", or "modules" where LoRA wraps the projections),
    `label_ids` the tokens whose logits are read: in float32, from float32 copies of the label rows, whatever the precision of
    the body. Calls from several threads wait for each other. When a parameter is replaced, moved or written to in place, the
    engine follows and drops what it kept; a write through `.data` is not seen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        label_ids: Sequence[int],
        *,
        backend: str | None = None,
        limits: Limits | None = None,
        deterministic: bool = False,
        cache_bytes: int | None = None,
        graph_bytes: int = 0,
        revision: str = "",
    ) -> None:
        """`revision` names the weights in the cache's keys; a prefix and its items stay within the model's positions whatever
        `limits` say. With `graph_bytes` small passes run from recordings that hold at most so much (`ranking.prefill.graphs`).
        Raises LabelError, BackendMissing and UnsupportedModel."""
        check_family(model)
        embedding = model.get_input_embeddings().weight
        self.label_ids = check_labels(label_ids, len(embedding))
        cpu, known = embedding.device.type == "cpu", longest_text(model)
        limits = limits or Limits(max_tokens=PASS_ROWS[cpu])
        self.limits = replace(limits, max_positions=min(known, limits.max_positions or known))
        self.model, self.deterministic = model.eval(), deterministic
        held = CACHE_BYTES[cpu] if cache_bytes is None else cache_bytes
        self.cache = PrefixCache(held, f"{revision}|{arithmetic_of(model)}")
        self._wanted, self._graph_bytes = backend, graph_bytes
        self._lock = threading.Lock()
        self._attach()

    def _attach(self) -> None:
        """The loop reads the model's parameters of now, and no prefix is kept that others made."""
        state = state_of(self.model)
        self.cache.clear()
        embedding = self.model.get_input_embeddings().weight
        device, dtype = embedding.device, embedding.dtype
        weights = Weights.of(self.model)
        if self.deterministic and self._graph_bytes:
            raise BackendMissing("recorded passes have padded shapes that deterministic scores cannot have; choose one of both")
        if weights is None:
            if self.deterministic or self._graph_bytes:
                raise BackendMissing("deterministic scores and recorded passes need plain weights; merge the LoRA first")
            chosen = choose(self._wanted, device.type, dtype)
            self.backend, self._modules = chosen.name, Layers(self.model, cascade(chosen.attend))
            log.info("projections are wrapped: the layer loop calls the modules and keeps no prefixes")
        else:
            tile = TILE if self.deterministic else None
            attention = _attention(self._wanted, device.type, dtype, tile)
            self.backend, lean = attention.name, Lean(weights, attention, tile)
            self._lean: Lean | Recorded = Recorded(lean, self._graph_bytes) if self._graph_bytes else lean
        self._head = self.model.get_output_embeddings().weight.detach()
        self._rows = torch.tensor(self.label_ids, device=device)
        # Last: what was refused above is refused at the next call too, and never served from the loop of before.
        self._state, self.loop = state, "modules" if weights is None else "lean"

    @property
    def stats(self) -> CacheStats:
        """What the prefix cache has done so far."""
        return self.cache.stats

    @property
    def arithmetic(self) -> str:
        """How the projections multiply: "float32", "bfloat16", "fp8" or "int8"."""
        return arithmetic_of(self.model)

    @property
    def graphs(self) -> GraphStats | None:
        """What the recorded passes have done so far; None if there are none."""
        return self._lean.stats if self.loop == "lean" and isinstance(self._lean, Recorded) else None

    def score(self, requests: Sequence[Request]) -> list[Logits]:
        """Return for each request the logits float32 [N, labels] at the last token of its N items, in input order.

        Each row is what the model says about `prefix + item` alone. Raises the errors of `plan`, and UnknownToken.
        """
        with self._lock, torch.inference_mode():
            self._follow()
            lean = self.loop == "lean"
            planned = plan(requests, self.limits, hoist=not self.deterministic, apart=lean)
            if planned.vectors is not None and not lean:
                raise UnknownVector("items of vectors need plain weights; merge the LoRA first")
            self._check(planned)
            logits = self._lean_logits(planned) if lean else self._module_logits(planned)
        return [logits[rows] for rows in planned.fan_out]

    def prefill(self, prefix: Sequence[int], history: Sequence[int] = ()) -> int:
        """The keys and values of a prefix are in the cache, if they fit its budget; returns how many tokens were computed.

        `history` as in Request. Raises EmptyPrefix, PrefixTooLong, UnknownToken, BadHistory, and BackendMissing if this engine
        keeps no prefixes.
        """
        if self.loop != "lean" or not self.cache.budget:
            raise BackendMissing("this engine keeps no prefixes: it has wrapped projections or a cache of 0 bytes")
        check_prefix(prefix, self.limits)
        edges = check_history(history, len(prefix), 0)
        tokens = np.array(prefix, np.int64)
        self._check_tokens(tokens, lowest=0)
        with self._lock, torch.inference_mode():
            self._follow()
            _, entry, computed = self._keys(tokens, edges)
            self.cache.release(entry)
        return computed

    def _follow(self) -> None:
        if state_of(self.model) != self._state:
            self._attach()

    def _lean_logits(self, planned: Plan) -> Logits:
        logits = np.empty((planned.unique_items, len(self.label_ids)), np.float32)
        vectors = self._vectors(planned)
        held: dict[int, tuple[Keys, Keys, int]] = {}
        try:
            for chunk in planned.chunks:
                for piece in chunk.pieces:
                    if piece.request not in held:
                        held[piece.request] = self._keys(
                            planned.prefixes[piece.request], planned.histories.get(piece.request, ())
                        )
                found = self._lean.read(chunk, [held[piece.request][0] for piece in chunk.pieces], vectors)
                logits[chunk.unique] = self._read(found)
                for piece in chunk.pieces:
                    if not piece.keep:
                        self.cache.release(held.pop(piece.request)[1])
        finally:
            for _, entry, _ in held.values():
                self.cache.release(entry)
        return logits

    def _vectors(self, planned: Plan) -> Tensor | None:
        if planned.vectors is None:
            return None
        if planned.vectors.shape[1] != self._head.shape[1]:
            raise UnknownVector(f"vectors of {planned.vectors.shape[1]} dimensions, the model reads {self._head.shape[1]}")
        vectors = torch.from_numpy(planned.vectors).to(self._head.device, self._head.dtype)
        if not vectors.isfinite().all():
            raise UnknownVector(f"a vector is not finite in the model's {self._head.dtype}")
        return vectors

    def _module_logits(self, planned: Plan) -> Logits:
        logits = np.empty((planned.unique_items, len(self.label_ids)), np.float32)
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for chunk in planned.chunks:
            logits[chunk.unique] = self._read(self._modules.read(chunk, kept))
        return logits

    def _read(self, hidden: Tensor) -> Logits:
        """The label logits of n hidden states, in deterministic mode by blocks of one shape."""
        labels = self._head[self._rows].float()
        step = TILE if self.deterministic else max(1, len(hidden))
        parts = []
        for first in range(0, len(hidden), step):
            some = hidden[first : first + step].float()
            full = torch.cat([some, some.new_zeros(step - len(some), some.shape[1])]) if len(some) < step else some
            parts.append((full @ labels.T)[: len(some)].cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, len(self.label_ids)), np.float32)

    def _keys(self, tokens: npt.NDArray[np.int64], history: tuple[int, ...] = ()) -> tuple[Keys, Keys, int]:
        """A prefix's keys and values, the cache entry that is pinned for them, and how many tokens were computed."""
        named = marked(tokens, history)
        entry, shared = self.cache.longest(named, whole_blocks=self.deterministic)
        shared = whole_entries(shared, len(tokens), history, self.deterministic)
        self.cache.count(shared, len(tokens) - shared)
        if entry is not None and shared == len(tokens):
            return (entry if entry.length == shared else Keys(entry.tensor, named, shared)), entry, 0
        weights, capacity = self._lean.weights, self._lean.capacity(len(tokens))
        try:
            made = Keys.empty(named, len(weights.blocks), capacity, weights.kv_heads, weights.dims, weights.embedding)
            if entry is not None:
                made.begin_like(entry, shared)
        finally:
            if entry is not None:
                self.cache.release(entry)
        made.pins = 1
        for stage in stages(shared, len(tokens), history, max(BLOCK, self.limits.max_tokens // BLOCK * BLOCK)):
            self._lean.extend(tokens[stage.start : stage.stop], made, stage.entries)
        self.cache.keep(made)
        return made, made, len(tokens) - shared

    def _check(self, planned: Plan) -> None:
        held = 0 if planned.vectors is None else len(planned.vectors)
        for chunk in planned.chunks:
            self._check_tokens(chunk.tokens, lowest=-held)
        for prefix in planned.prefixes.values():
            self._check_tokens(prefix, lowest=0)

    def _check_tokens(self, tokens: npt.NDArray[np.int64], lowest: int) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        vocabulary = len(self.model.get_input_embeddings().weight)
        if low < lowest or high >= vocabulary:
            wrong = low if low < lowest else high
            raise UnknownToken(f"token id {wrong} is outside the model's vocabulary of {vocabulary}")


def _attention(name: str | None, device: str, dtype: torch.dtype, tile: int | None) -> Attention:
    """The named attention, or the fastest that works here; with `tile` the steady one. Raises BackendMissing."""
    if tile is None:
        chosen = choose(name, device, dtype)
        return Cascade(chosen.name, chosen.attend)
    if device != "cpu" or name not in (None, Steady.name):
        asked = name or "any backend"
        raise BackendMissing(f'deterministic scores need the backend "{Steady.name}" on a CPU, asked for {asked} on {device}')
    return Steady(tile)
