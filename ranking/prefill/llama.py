"""The plain layer loop over the modules of a LLaMA-family model: packed tokens in, one hidden state per item out.

Training runs through it, and the fast loop (`ranking.prefill.lean`) is held against it. The modules are called in place (norms,
linear layers, MLP, rotary table), so the weights are held once and a LoRA wrapper around a linear layer keeps working. What is
ours is attention: packed segments instead of a mask, and a last layer that computes queries, output and MLP only in the rows
where a score is read. Works under autograd.

Legend: T packed tokens, P prefix rows of the pass, n items of the pass, H query heads, G key heads, D dims of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from ranking.prefill.attend import Attend, Bounds, blend
from ranking.prefill.plan import Chunk
from ranking.prefill.weights import check_family, head_dims

Kept = dict[int, list[tuple[Tensor, Tensor]]]
"""Keys and values of prefixes that a later pass needs: request -> per layer (k [P,G,D] after rotation, v [P,G,D])."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows attend to which in one layer of one pass; bounds are int32 on the host.

    Queries in segments `queries` see the keys in segments `keys` (rows counted from `first_key`), causally or all of
    them; queries from row `first_cross` on, in segments `cross_queries`, also see all of their request's prefix, in
    segments `cross_keys` of the concatenated prefixes.
    """

    queries: Bounds
    keys: Bounds
    causal: bool
    first_key: int
    first_cross: int
    cross_queries: Bounds
    cross_keys: Bounds


Mixer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Layout], Tensor]
"""(q [rows,H,D], k, v [T,G,D], prefix k, v [all prefix rows,G,D], layout) -> out [rows,H,D]."""


def cascade(attend: Attend) -> Mixer:
    """Return the mixer that makes two calls of a backend, prefix and self, and merges them by log-sum-exp."""

    def mix(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, layout: Layout) -> Tensor:
        own_k, own_v = k[layout.first_key :], v[layout.first_key :]
        own, own_lse = attend(q, own_k, own_v, layout.queries, layout.keys, layout.causal)
        row = layout.first_cross
        seen, seen_lse = attend(q[row:], prefix_k, prefix_v, layout.cross_queries, layout.cross_keys, False)
        merged = blend(seen, seen_lse, own[row:], own_lse[row:])
        return torch.cat((own[:row], merged)) if row else merged

    return mix


def layouts(chunk: Chunk) -> tuple[Layout, Layout]:
    """Return the layout of every layer but the last, and of the last layer, where only the items' last rows ask."""
    rows = [chunk.prefix_rows] + [piece.last_row for piece in chunk.pieces]
    items = [0] + [piece.items for piece in chunk.pieces]
    prefixes = [0] + [piece.prefix_tokens for piece in chunk.pieces]
    cross_keys = np.cumsum(prefixes, dtype=np.int32)
    cross_queries = np.array(rows, np.int32) - np.int32(chunk.prefix_rows)
    body = Layout(chunk.segments, chunk.segments, True, 0, chunk.prefix_rows, cross_queries, cross_keys)
    last = Layout(
        queries=np.arange(len(chunk.last) + 1, dtype=np.int32),
        keys=chunk.item_bounds - np.int32(chunk.prefix_rows),
        causal=False,
        first_key=chunk.prefix_rows,
        first_cross=0,
        cross_queries=np.cumsum(items, dtype=np.int32),
        cross_keys=cross_keys,
    )
    return body, last


class Layers:
    """The layer loop of one model with one way of attention."""

    def __init__(self, model: PreTrainedModel, mixer: Mixer) -> None:
        """Raises UnsupportedModel unless `model` is of the LLaMA family."""
        check_family(model)
        self.model, self.mixer = model, mixer
        self._dims = head_dims(model)

    def read(self, chunk: Chunk, kept: Kept) -> Tensor:
        """Return the hidden state [n, hidden] after the final norm at the last token of each item of the pass.

        Takes from `kept` the prefixes of requests that go on from an earlier pass, and leaves there those that a later
        pass needs.
        """
        body = self.model.model
        device = body.embed_tokens.weight.device
        x = body.embed_tokens(torch.from_numpy(chunk.tokens).to(device))
        cos, sin = body.rotary_emb(x[None], torch.from_numpy(chunk.positions).to(device)[None])
        angles = (cos[0, :, None], sin[0, :, None])
        inner, final = layouts(chunk)
        for number, layer in enumerate(body.layers[:-1]):
            x = self._layer(layer, number, x, angles, chunk, inner, None, kept)
        last = torch.from_numpy(chunk.last).to(device)
        x = self._layer(body.layers[-1], len(body.layers) - 1, x, angles, chunk, final, last, kept)
        for piece in chunk.pieces:
            if not piece.keep:
                kept.pop(piece.request, None)
        return body.norm(x)

    def _layer(
        self,
        layer: Any,
        number: int,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        chunk: Chunk,
        layout: Layout,
        read: Tensor | None,
        kept: Kept,
    ) -> Tensor:
        attention = layer.self_attn
        normed = isinstance(attention, Qwen3Attention)
        h = layer.input_layernorm(x)
        k = self._heads(attention.k_proj(h))
        k = rotate(attention.k_norm(k) if normed else k, *angles)
        v = self._heads(attention.v_proj(h))
        if read is not None:
            x, h, angles = x[read], h[read], (angles[0][read], angles[1][read])
        q = self._heads(attention.q_proj(h))
        q = rotate(attention.q_norm(q) if normed else q, *angles)
        prefix_k, prefix_v = _prefixes(k, v, number, chunk, kept)
        mixed = self.mixer(q, k, v, prefix_k, prefix_v, layout)
        x = x + attention.o_proj(mixed.flatten(1))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), -1, self._dims)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads [T,heads,D] turned by their positions' angles, cos and sin [T,1,D], halves paired as in LLaMA."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


def _prefixes(k: Tensor, v: Tensor, number: int, chunk: Chunk, kept: Kept) -> tuple[Tensor, Tensor]:
    """Return the keys and values of every piece's prefix, in the order of the pieces; keep those needed later."""
    row, parts_k, parts_v = 0, [], []
    for piece in chunk.pieces:
        if piece.prefix:
            pair = (k[row : row + piece.prefix_tokens], v[row : row + piece.prefix_tokens])
            row += piece.prefix_tokens
            if piece.keep:
                kept.setdefault(piece.request, []).append((pair[0].clone(), pair[1].clone()))
        else:
            pair = kept[piece.request][number]
        parts_k.append(pair[0])
        parts_v.append(pair[1])
    if row == chunk.prefix_rows and all(piece.prefix for piece in chunk.pieces):
        return k[:row], v[:row]
    return torch.cat(parts_k), torch.cat(parts_v)
