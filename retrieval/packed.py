"""A trunk read without padding: rows lie end to end, and only attention knows where one ends and the next begins.

Everything but attention concerns one token alone, so it is done over all tokens of a batch, in blocks that stay in the cache.
Rows come sorted by length; those of equal length are one attention call on views. The honest twin is the Hugging Face module,
whose weights these are. Gate and up lie side by side, the module's own parameters being views of the joint matrix. q, k and v are
a copy (a tenth more memory in a LLaMA of 1B), because a head's numbers stand in another order: the two that rotary positions turn
together are neighbours, so that a turn is one complex product. Scores do not see the order, and v keeps its own.

A row's vector does not depend on its neighbours, bit for bit, where the matrix library sums a row of a product in the same order
whatever the number of rows. MKL does from 16 rows on (measured with AVX-512, docs/scale.md), so no product has fewer than `TILE`.

Legend: T packed tokens, n rows, H query heads, G key heads, D dims of a head.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

TILE = 64
"""Tokens of a batch are filled up to a multiple of this."""
BLOCK = 1_024
"""Tokens that pass through a layer's products together on a CPU."""
BLOCK_ELSEWHERE = 65_536
BY_POSITION = frozenset(("default", "linear", "llama3", "yarn"))
"""Rotary scalings whose angles depend on the position alone, not on how long the batch's longest row is."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joint:
    """y = x @ weight.T + bias of one or several linear layers that read the same rows."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *layers: nn.Linear) -> Joint:
        """The layers' weights lie side by side from now on, and the layers' parameters are views of them."""
        bias = _side_by_side([layer.bias for layer in layers]) if layers[0].bias is not None else None
        return cls(_side_by_side([layer.weight for layer in layers]), bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """The product stands in `out`."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def onto(self, x: Tensor, out: Tensor) -> None:
        """The product is added to `out`."""
        out.addmm_(x, self.weight.t())
        if self.bias is not None:
            out.add_(self.bias)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; `gains` of its two norms, and of Qwen3's norms of query and key heads."""

    gains: tuple[Tensor, Tensor]
    head_gains: tuple[Tensor, Tensor] | None
    qkv: Joint
    o: Joint
    gate_up: Joint
    down: Joint

    @classmethod
    def of(cls, layer: Any) -> Layer:
        """The weights of a Hugging Face layer."""
        attention, mlp = layer.self_attn, layer.mlp
        dims = int(attention.head_dim)
        qwen3 = isinstance(attention, Qwen3Attention)
        return cls(
            (layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()),
            (_paired(attention.q_norm.weight, dims), _paired(attention.k_norm.weight, dims)) if qwen3 else None,
            _projections(attention.q_proj, attention.k_proj, attention.v_proj, dims),
            Joint.of(attention.o_proj),
            Joint.of(mlp.gate_proj, mlp.up_proj),
            Joint.of(mlp.down_proj),
        )


class Packed:
    """Last hidden states of rows of token ids, by the weights of a LLaMA-family trunk. Threads may share it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """For models of which `refusal` says nothing; they only serve: an optimizer would not know of the joint matrices."""
        config = model.config
        self.embedding: Tensor = model.embed_tokens.weight.detach()
        self.layers = tuple(Layer.of(layer) for layer in model.layers)
        self.gain: Tensor = model.norm.weight.detach()
        self._epsilon, self._rotary = config.rms_norm_eps, model.rotary_emb
        self._heads, self._kv_heads, self._mlp = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
        self._dims = int(model.layers[0].self_attn.head_dim)
        self._space = _Space()

    def states(self, rows: Sequence[Sequence[int]], read: Callable[[Tensor], Tensor]) -> Tensor:
        """float32 [n, hidden]: `read` of the last hidden states [rows, length, hidden] of each run of rows of equal length.

        Rows come in rising length, none empty.
        """
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        runs = _runs(lengths)
        x, qkv, turns = self._enter(rows, lengths)
        mixed = self._take("mixed", len(x), self._heads * self._dims)
        mixed[int(lengths.sum()) :] = 0
        for number, layer in enumerate(self.layers):
            for some in self._blocks(len(x)):
                if number:
                    layer.qkv.into(self._norm(x[some], layer.gains[0]), qkv[some])
                self._turn(layer, qkv[some], turns[some])
            self._attend(qkv, runs, mixed)
            for some in self._blocks(len(x)):
                self._close(layer, x[some], mixed[some])
        for some in self._blocks(len(x)):
            x[some] = self._norm(x[some], self.gain)
        return torch.cat([read(x[run.start : run.stop].view(run.rows, run.length, -1)) for run in runs])

    def _enter(self, rows: Sequence[Sequence[int]], lengths: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [T, hidden] and the first layer's projections [T, (H + 2 G) D] of all tokens, T a multiple of `TILE`.

        Before a token is turned by its position, what the first layer projects it to depends on its id alone: each id is done
        once. With them come the turns of the positions, complex64 [T, 1, D / 2].
        """
        count = int(lengths.sum())
        ids, positions = np.zeros((2, _filled(count)), np.int64)
        ids[:count] = np.fromiter(itertools.chain.from_iterable(rows), np.int64, count)
        positions[:count] = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        distinct, which = np.unique(ids, return_inverse=True)
        distinct = np.concatenate([distinct, np.zeros(_filled(len(distinct)) - len(distinct), np.int64)])
        device = self.embedding.device
        known, at = self.embedding[torch.from_numpy(distinct).to(device)], torch.from_numpy(which).to(device)
        x = torch.index_select(known, 0, at, out=self._take("x", len(ids), known.shape[1]))
        width = (self._heads + 2 * self._kv_heads) * self._dims
        projected = self._take("projected", len(known), width)
        for some in self._blocks(len(known)):
            self.layers[0].qkv.into(self._norm(known[some], self.layers[0].gains[0]), projected[some])
        qkv = torch.index_select(projected, 0, at, out=self._take("qkv", len(ids), width))
        half = self._dims // 2
        cos, sin = self._rotary(x[:0].float(), torch.arange(int(lengths.max()), device=device)[None])
        turns = torch.complex(cos[0, :, :half], sin[0, :, :half])
        return x, qkv, turns[torch.from_numpy(positions).to(device), None]

    def _turn(self, layer: Layer, qkv: Tensor, turns: Tensor) -> None:
        """Queries and keys are turned in place by their positions' angles."""
        both = qkv[:, : (self._heads + self._kv_heads) * self._dims].unflatten(1, (-1, self._dims))
        if layer.head_gains is not None:
            for heads, gain in zip(both.split([self._heads, self._kv_heads], dim=1), layer.head_gains):
                heads.copy_(self._head_norm(heads, gain))
        wide = both.float()
        torch.view_as_complex(wide.unflatten(2, (-1, 2))).mul_(turns)
        if wide is not both:
            both.copy_(wide)

    def _attend(self, qkv: Tensor, runs: Sequence[_Run], mixed: Tensor) -> None:
        """Every token sees itself and what stands before it in its row; the answers stand in `mixed`."""
        for run in runs:
            heads = qkv[run.start : run.stop].view(run.rows, run.length, -1, self._dims).transpose(1, 2)
            q, k, v = heads.split([self._heads, self._kv_heads, self._kv_heads], dim=1)
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self._heads != self._kv_heads)
            mixed[run.start : run.stop].view(run.rows, run.length, self._heads, self._dims).copy_(out.transpose(1, 2))

    def _close(self, layer: Layer, x: Tensor, mixed: Tensor) -> None:
        """Output projection and MLP are added to the residual `x` in place."""
        layer.o.onto(mixed, x)
        both = self._take("mlp", len(x), 2 * self._mlp)
        layer.gate_up.into(self._norm(x, layer.gains[1]), both)
        gate, up = both.split(self._mlp, dim=1)
        layer.down.onto(functional.silu(gate, inplace=True).mul_(up), x)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm in a reused buffer, its sum of squares in float32."""
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(self._epsilon).rsqrt_()
        out = self._take("norm", *x.shape)
        if wide is x:
            torch.mul(x, scale, out=out)
        else:
            out.copy_(wide.mul_(scale))
        return out.mul_(gain)

    def _head_norm(self, heads: Tensor, gain: Tensor) -> Tensor:
        wide = heads.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + self._epsilon).rsqrt()
        return wide.to(heads.dtype) * gain

    def _blocks(self, rows: int) -> list[slice]:
        step = BLOCK if self.embedding.device.type == "cpu" else BLOCK_ELSEWHERE
        return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _take(self, name: str, *shape: int) -> Tensor:
        return self._space.take(name, shape, self.embedding)


@dataclass(frozen=True, slots=True)
class _Run:
    """`rows` rows of equal `length`: the packed tokens from `start` to `stop`."""

    start: int
    rows: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.length


class _Space(threading.local):
    """Named buffers that only grow, each thread's its own: fresh memory costs more than the sums done in it."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor over the name's memory, in the dtype and on the device of `like`, contents undefined."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.zeros(size, dtype=like.dtype, device=like.device)
        return flat[:size].view(shape)


def has_bfloat16_units(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32 here: a GPU, or a CPU with AMX. Logged."""
    units = device != "cpu" or torch.cpu._is_amx_tile_supported()
    log.info("bfloat16 matrix units on %s: %s", device, "yes" if units else "no")
    return units


def refusal(model: PreTrainedModel) -> str:
    """Why `Packed` would not compute what this model computes, "" if it does."""
    config = model.config
    if not isinstance(model, LlamaModel | MistralModel | Qwen2Model | Qwen3Model):
        return f"{type(model).__name__} is not of the LLaMA family"
    if (rope := config.rope_parameters["rope_type"]) not in BY_POSITION:
        return f"the angles of rotary scaling {rope!r} depend on the batch"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not silu"
    if config.to_dict().get("sliding_window") is not None:
        return "its attention is a sliding window"
    halves = [half for layer in model.layers for half in (layer.self_attn, layer.mlp)]
    if not all(type(part) is nn.Linear for half in halves for name, part in half.named_children() if name.endswith("_proj")):
        return "its projections are wrapped"
    return ""


def packed(model: PreTrainedModel) -> Packed | None:
    """The trunk read without padding, or None, logged, for a model whose module has to be called instead."""
    if reason := refusal(model):
        log.info("rows are padded and read by the module: %s", reason)
        return None
    return Packed(model)


def _projections(q: nn.Linear, k: nn.Linear, v: nn.Linear, dims: int) -> Joint:
    """Queries, keys and values by one product, the numbers of query and key heads in pairs."""

    def joined(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        return torch.cat([_paired(first, dims), _paired(second, dims), third.detach()])

    return Joint(joined(q.weight, k.weight, v.weight), None if q.bias is None else joined(q.bias, k.bias, v.bias))


def _paired(heads: Tensor, dims: int) -> Tensor:
    """Rows [heads * D, ...] with number i of each head beside number i + D / 2."""
    return heads.detach().unflatten(0, (-1, 2, dims // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    if len(parameters) == 1:
        return parameters[0].detach()
    joint = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joint.split([len(parameter) for parameter in parameters])):
        parameter.data = part
    return joint


def _filled(count: int) -> int:
    return -(-count // TILE) * TILE


def _runs(lengths: np.ndarray) -> list[_Run]:
    """Consecutive rows of equal length."""
    edges = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return [_Run(int(starts[first]), last - first, int(lengths[first])) for first, last in itertools.pairwise(edges)]
