"""Our own layer loop over the weights of a Hugging Face LLaMA: packed tokens in, one hidden state per item out.

The modules of the `LlamaForCausalLM` are called in place (norms, linear layers, MLP, rotary table), so the weights are
held once and a LoRA wrapper around a linear layer keeps working. What is ours is attention: packed segments instead of a
mask, and a last layer that computes queries, output and MLP only in the rows where a score is read. Works under autograd.

Legend: T packed tokens, P prefix rows of the pass, n items of the pass, H query heads, G key heads, D dims of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from index.errors import BrewlineError
from ranking.prefill.attend import Attend, Bounds, merge
from ranking.prefill.plan import Chunk

KNOWN_ROPE = frozenset(("default", "linear", "llama3", "yarn"))
"""Rotary scalings whose angle depends on the position alone. "dynamic" and "longrope" also depend on the longest text
of a pass, so a score would change with its neighbours."""

Kept = dict[int, list[tuple[Tensor, Tensor]]]
"""Keys and values of prefixes that a later pass needs: request -> per layer (k [P,G,D] after rotation, v [P,G,D])."""


class UnsupportedModel(BrewlineError):
    """The model is not a LLaMA that the layer loop computes correctly."""


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
        merged, _ = merge(seen, seen_lse, own[row:], own_lse[row:])
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

    def __init__(self, model: LlamaForCausalLM, mixer: Mixer) -> None:
        """Raises UnsupportedModel unless `model` is a LLaMA with a rotary scaling that depends on positions alone."""
        if not isinstance(model, LlamaForCausalLM):
            raise UnsupportedModel(f"expected a LlamaForCausalLM, got {type(model).__name__}")
        rope = model.config.rope_parameters["rope_type"]
        if rope not in KNOWN_ROPE:
            raise UnsupportedModel(f'rotary scaling "{rope}" depends on the longest text of a batch; known: {sorted(KNOWN_ROPE)}')
        self.model = model
        self.mixer = mixer
        config = model.config
        self._dims = config.head_dim or config.hidden_size // config.num_attention_heads

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
        layer: LlamaDecoderLayer,
        number: int,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        chunk: Chunk,
        layout: Layout,
        read: Tensor | None,
        kept: Kept,
    ) -> Tensor:
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        k = rotate(self._heads(attention.k_proj(h)), *angles)
        v = self._heads(attention.v_proj(h))
        if read is not None:
            x, h, angles = x[read], h[read], (angles[0][read], angles[1][read])
        q = rotate(self._heads(attention.q_proj(h)), *angles)
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
