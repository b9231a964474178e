"""Scores many items after each prefix in as few passes as the token budget allows, and reads only the labels' logits.

Prefixes become keys and values once and stay in a cache; items are packed over them. `Engine.prefill` warms a member's prefix
while retrieval still runs. With `deterministic` a score is the same bit for bit whatever the neighbours, their order, the
chunking, the batch and the state of the cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ranking.prefill.attend import BackendMissing, choose
from ranking.prefill.cache import CacheStats, Keys, PrefixCache
from ranking.prefill.errors import LabelError, UnknownToken, UnknownVector
from ranking.prefill.joint import Joint
from ranking.prefill.lean import Attention, Cascade, Lean
from ranking.prefill.llama import Layers, cascade
from ranking.prefill.plan import Limits, Plan, Request, plan
from ranking.prefill.weights import Weights, longest_text

log = logging.getLogger(__name__)

Logits = npt.NDArray[np.float32]
JOINT = Joint.name
TILE = 256
"""Rows of every matrix product in deterministic mode."""
CACHE_BYTES = {True: 256 << 20, False: 4 << 30}
"""Bytes of kept prefixes, on a CPU and elsewhere (a prefix of 1,024 tokens of a 3B model holds 112 MiB)."""
PASS_ROWS = {True: 8_192, False: 32_768}
"""Tokens of one pass, on a CPU and elsewhere."""


class Engine:
    """Multi-item scoring over one Hugging Face model of the LLaMA family, whose weights it shares.

    `backend` names the attention in use, `loop` the layer loop ("lean", or "modules" where LoRA wraps the projections),
    `label_ids` the tokens whose logits are read: in float32, from float32 copies of the label rows, whatever the precision of
    the body. Calls from several threads wait for each other. When a weight is written to in place, the kept prefixes are dropped.
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
        revision: str = "",
    ) -> None:
        """`revision` names the weights in the cache's keys. Raises LabelError, BackendMissing and UnsupportedModel."""
        weights = Weights.of(model)
        embedding = model.get_input_embeddings().weight
        cpu = embedding.device.type == "cpu"
        _check_labels(label_ids, len(embedding))
        self.model, self.label_ids, self.deterministic = model.eval(), tuple(label_ids), deterministic
        self.limits = limits or Limits(max_tokens=PASS_ROWS[cpu], max_positions=longest_text(model))
        self.cache = PrefixCache(CACHE_BYTES[cpu] if cache_bytes is None else cache_bytes, f"{revision}|{embedding.dtype}")
        self._lock = threading.Lock()
        self.loop = "modules" if weights is None else "lean"
        device, dtype = embedding.device, embedding.dtype
        if weights is None:
            if deterministic:
                raise BackendMissing("deterministic scores need plain weights; merge the LoRA first")
            chosen = choose(None if backend in (None, JOINT) else backend, device.type, dtype)
            self.backend, self._modules = chosen.name, Layers(model, cascade(chosen.attend))
            log.info("projections are wrapped: the layer loop calls the modules and keeps no prefixes")
        else:
            attention = _attention(backend, device.type, dtype, TILE if deterministic else None)
            self.backend, self._lean = attention.name, Lean(weights, attention, TILE if deterministic else None)
            self._version = weights.version
        self._head = model.get_output_embeddings().weight.detach()
        self._rows = torch.tensor(self.label_ids, device=device)

    @property
    def stats(self) -> CacheStats:
        """What the prefix cache has done so far."""
        return self.cache.stats

    def score(self, requests: Sequence[Request]) -> list[Logits]:
        """Return for each request the logits float32 [N, labels] at the last token of its N items, in input order.

        Each row is what the model says about `prefix + item` alone. Raises the errors of `plan`, and UnknownToken.
        """
        lean = self.loop == "lean"
        planned = plan(requests, self.limits, hoist=not self.deterministic, apart=lean)
        if planned.vectors is not None and not lean:
            raise UnknownVector("items of vectors need plain weights; merge the LoRA first")
        self._check(planned)
        with self._lock, torch.inference_mode():
            self._drop_stale()
            logits = self._lean_logits(planned) if lean else self._module_logits(planned)
        return [logits[rows] for rows in planned.fan_out]

    def prefill(self, prefix: Sequence[int]) -> int:
        """The keys and values of a prefix are in the cache; returns how many of its tokens had to be computed.

        Raises UnknownToken, and BackendMissing if this engine keeps no prefixes.
        """
        if self.loop != "lean" or not self.cache.budget:
            raise BackendMissing("this engine keeps no prefixes: it has wrapped projections or a cache of 0 bytes")
        tokens = np.array(prefix, np.int64)
        self._check_tokens(tokens, lowest=0)
        before = self.stats.tokens_computed
        with self._lock, torch.inference_mode():
            self._drop_stale()
            self._give_back(self._keys(tokens))
        return self.stats.tokens_computed - before

    def _drop_stale(self) -> None:
        """No prefix is kept that other weights made, and the label rows are the head's of now."""
        if self.loop == "lean" and (version := self._lean.weights.version) != self._version:
            self.cache.clear()
            self._version = version

    def _lean_logits(self, planned: Plan) -> Logits:
        logits = np.empty((planned.unique_items, len(self.label_ids)), np.float32)
        vectors = None if planned.vectors is None else torch.from_numpy(planned.vectors).to(self._head.device)
        held: dict[int, tuple[Keys, Keys]] = {}
        try:
            for chunk in planned.chunks:
                for piece in chunk.pieces:
                    if piece.request not in held:
                        held[piece.request] = self._keys(planned.prefixes[piece.request])
                found = self._lean.read(chunk, [held[piece.request][0] for piece in chunk.pieces], vectors)
                logits[chunk.unique] = self._read(found)
                for piece in chunk.pieces:
                    if not piece.keep:
                        self._give_back(held.pop(piece.request))
        finally:
            for pair in held.values():
                self._give_back(pair)
        return logits

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

    def _keys(self, tokens: npt.NDArray[np.int64]) -> tuple[Keys, Keys]:
        """A prefix's keys and values, found or computed, and the cache entry that is pinned for them."""
        entry, shared = self.cache.longest(tokens, whole_blocks=self.deterministic)
        self.cache.count(shared, len(tokens) - shared)
        if entry is not None and shared == len(tokens):
            return (entry if entry.length == shared else Keys(entry.tensor, tokens, shared)), entry
        weights = self._lean.weights
        made = Keys.empty(
            tokens,
            len(weights.blocks),
            self._lean.capacity(len(tokens)),
            weights.kv_heads,
            weights.dims,
            weights.embedding,
        )
        made.pins = 1
        if entry is not None:
            made.begin_like(entry, shared)
            self.cache.release(entry)
        for first in range(shared, len(tokens), self.limits.max_tokens):
            self._lean.extend(tokens[first : first + self.limits.max_tokens], made)
        self.cache.keep(made)
        return made, made

    def _give_back(self, pair: tuple[Keys, Keys]) -> None:
        self.cache.release(pair[1])

    def _check(self, planned: Plan) -> None:
        held = 0 if planned.vectors is None else len(planned.vectors)
        for chunk in planned.chunks:
            self._check_tokens(chunk.tokens, lowest=-held)
        for prefix in planned.prefixes.values():
            self._check_tokens(prefix, lowest=0)
        if planned.vectors is not None and planned.vectors.shape[1] != self._head.shape[1]:
            raise UnknownVector(f"vectors of {planned.vectors.shape[1]} dimensions, the model reads {self._head.shape[1]}")

    def _check_tokens(self, tokens: npt.NDArray[np.int64], lowest: int) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        vocabulary = len(self.model.get_input_embeddings().weight)
        if low < lowest or high >= vocabulary:
            wrong = low if low < lowest else high
            raise UnknownToken(f"token id {wrong} is outside the model's vocabulary of {vocabulary}")


def _attention(name: str | None, device: str, dtype: torch.dtype, tile: int | None) -> Attention:
    """The named attention, or the fastest that is exact enough here: joint products for float32 on a CPU, else blocked kernels.

    In bfloat16 the joint products would round the scores before the softmax. Raises BackendMissing.
    """
    if tile is not None and (device != "cpu" or name not in (None, JOINT)):
        raise BackendMissing(f'deterministic scores need the backend "{JOINT}" on a CPU, asked for {name or "any"} on {device}')
    if device == "cpu" and (name == JOINT or tile is not None or (name is None and dtype == torch.float32)):
        return Joint(tile)
    if name == JOINT:
        raise BackendMissing(f'attention backend "{JOINT}" is made for cpu, not for {device}')
    chosen = choose(name, device, dtype)
    return Cascade(chosen.name, chosen.attend)


def _check_labels(label_ids: Sequence[int], vocabulary: int) -> None:
    if not label_ids or len(set(label_ids)) != len(label_ids):
        raise LabelError(f"labels need distinct token ids, got {list(label_ids)}")
    if min(label_ids) < 0 or max(label_ids) >= vocabulary:
        raise LabelError(f"label ids {list(label_ids)} do not fit a vocabulary of {vocabulary}")
