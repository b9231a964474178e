"""A new ranker that compares from the first step: its first weights hold the words of an item against the words before it.

From random weights a short training never finds that product; it has to find attention to the item, attention to the history and
their product at once. So a new model starts with exactly that circuit, in weights that training then moves as it
likes; everything else starts as usual. (The idea of structured first weights: mimetic initialisation, arXiv 2305.09828.)

    first layer   one head of each token looks for the item's opening token: "I belong to an item" (MARK)
    last layer    at the answer token, half of the heads average the words of the item, the other half the words before it
    last MLP      multiplies the two averages coordinate by coordinate into one number (MATCH); silu(g) - silu(-g) = g is exact
    answer rows   read MATCH with opposite signs

The hidden dims are [S word dims | S further word dims, or a special token's own | CONSTANT, OPENS, MARK, MATCH, room].
Legend: D hidden dims, S word dims that are compared, V tokens, G key heads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from retrieval.prompts import ANSWER, ITEM
from retrieval.tokens import Tokens

log = logging.getLogger(__name__)

NORM = 4.0
"""Length of every token's vector. Equal lengths matter: RMS norm would make a short vector's mark louder than the others'."""
SHARPNESS = 8.0
"""Logit by which a head prefers the tokens it looks for: e^8 outweighs a long history."""
NOISE = 0.02
SLOW = 4
"""Rotary pairs that carry the marks, the slowest ones: they hardly turn over the length of a prompt."""
GAIN_ITEM, GAIN_BEFORE, GAIN_MATCH, GAIN_ANSWER = 1.0, 2.0, 0.1875, 0.1


@dataclass(frozen=True)
class _Plan:
    """Where things lie: `half` word dims for each key head, and four dims of their own."""

    heads: int
    key_heads: int
    head_dims: int
    half: int

    @property
    def words(self) -> int:
        return self.key_heads * self.half

    @property
    def constant(self) -> int:
        return 2 * self.words

    @property
    def opens(self) -> int:
        return self.constant + 1

    @property
    def mark(self) -> int:
        return self.constant + 2

    @property
    def match(self) -> int:
        return self.constant + 3

    @property
    def slow(self) -> Tensor:
        return torch.arange(self.head_dims // 2 - SLOW, self.head_dims // 2)

    @property
    def scale(self) -> float:
        """Weight of a mark in a query or key, so that two of them meet with a logit of SHARPNESS."""
        hidden = self.heads * self.head_dims
        loud = hidden**0.5 / (NORM**2 + 2) ** 0.5  # a dim of value 1 after the RMS norm of a token's vector
        return (SHARPNESS * self.head_dims**0.5 / SLOW) ** 0.5 / loud


def start_to_compare(model: LlamaForCausalLM, tokens: Tokens, vectors: Tensor, labels: Mapping[str, tuple[int, int]]) -> bool:
    """Give a new model the comparing start; False, and nothing changed, if its shape has no room for it.

    `vectors` [V, any width] hold what is known of words (rows of special tokens: a start of their own); `labels` the (positive,
    negative) answer tokens of each task. Draws from torch's current seed.
    """
    plan = _room(model)
    if plan is None:
        log.warning("a model of this shape has no room for the comparing start: it starts from random weights")
        return False
    with torch.no_grad():
        _vocabulary(model, tokens, vectors.detach().float(), labels, plan)
        _mark_items(model, plan)
        _average(model, plan)
        _multiply(model, plan)
    return True


def _room(model: LlamaForCausalLM) -> _Plan | None:
    config = model.config
    head_dims = config.head_dim or config.hidden_size // config.num_attention_heads
    half = min(head_dims - 2, (config.hidden_size - 8) // (2 * config.num_key_value_heads))
    plan = _Plan(config.num_attention_heads, config.num_key_value_heads, head_dims, half)
    fits = config.num_hidden_layers >= 2 and plan.heads >= 2 * plan.key_heads and head_dims >= 2 * SLOW and half > 0
    return plan if fits and 2 * plan.words <= config.intermediate_size else None


def _vocabulary(
    model: LlamaForCausalLM, tokens: Tokens, vectors: Tensor, labels: Mapping[str, tuple[int, int]], plan: _Plan
) -> None:
    """Words keep their principal coordinates, the most telling first; special tokens get a vector of their own elsewhere."""
    weight = model.get_input_embeddings().weight
    special = torch.tensor(sorted({tokens.id(token) for token in tokens.special}))
    is_word = torch.ones(len(weight), dtype=torch.bool)
    is_word[special] = False
    known = torch.zeros(len(weight), vectors.shape[1])
    known[: len(vectors)] = vectors
    words = known * is_word[:, None]
    words = (words - words[is_word].mean(0)) * is_word[:, None]
    axes = torch.linalg.svd(words, full_matrices=False)[2][: 2 * plan.words]
    weight.normal_(std=NOISE)
    weight[:, : len(axes)] += _of_length(words @ axes.T)
    own = known[special, : plan.words]
    weight[special, plan.words : plan.words + own.shape[1]] += _of_length(own)
    weight[:, plan.constant :] = 0
    weight[:, plan.constant] = 1
    weight[tokens.id(ITEM), plan.opens] = 1
    answer = weight[tokens.id(ANSWER)]
    answer[: plan.constant] = NOISE * torch.randn(plan.constant)  # the averages are written here
    answer[plan.match + 1 :] = NORM / max(1, len(answer) - plan.match - 1) ** 0.5
    for pair in dict.fromkeys(labels.values()):
        for token, sign in zip(pair, (1, -1)):
            weight[token] = NOISE / 20 * torch.randn(weight.shape[1])
            weight[token, plan.match] = sign * GAIN_ANSWER


def _of_length(rows: Tensor) -> Tensor:
    """The rows at length NORM; rows of nothing stay nothing."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6) * NORM


def _mark_items(model: LlamaForCausalLM, plan: _Plan) -> None:
    """The first head of the first layer finds the item's opening token, which tokens before the item cannot see."""
    attention = model.model.layers[0].self_attn
    q, k, v, o = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.o_proj.weight)
    size = plan.head_dims
    q[:size], k[:size] = 0, 0
    q[plan.slow, plan.constant] = plan.scale
    k[plan.slow, plan.opens] = plan.scale
    v[size - 1], o[:, size - 1] = 0, 0
    v[size - 1, plan.opens] = 1
    o[plan.mark, size - 1] = (NORM**2 + 2) ** 0.5 / (plan.heads * size) ** 0.5  # undoes the norm: MARK is 1


def _average(model: LlamaForCausalLM, plan: _Plan) -> None:
    """In the last layer two heads of each key head read word dims: one of marked tokens, one of the others."""
    attention = model.model.layers[-1].self_attn
    q, k, v, o = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.o_proj.weight)
    q.normal_(std=NOISE)
    k.normal_(std=NOISE)
    dims, group = torch.arange(plan.half), plan.heads // plan.key_heads
    for key_head in range(plan.key_heads):
        top, first = key_head * plan.head_dims, key_head * plan.half
        k[top + plan.slow, plan.mark] += plan.scale
        v[top + dims] = 0
        v[top + dims, first + dims] = 1
        for place, (sign, target, gain) in enumerate(((1, 0, GAIN_ITEM), (-1, plan.words, GAIN_BEFORE))):
            row = (key_head * group + place) * plan.head_dims
            q[row + plan.slow, plan.constant] += sign * plan.scale
            o[target + first + dims, row + dims] += gain


def _multiply(model: LlamaForCausalLM, plan: _Plan) -> None:
    """The last MLP adds up the products of the two averages' coordinates."""
    mlp = model.model.layers[-1].mlp
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    dims = torch.arange(plan.words)
    for unit, sign in ((dims, 1), (plan.words + dims, -1)):
        gate[unit], up[unit], down[:, unit] = 0, 0, 0
        gate[unit, dims] = sign
        up[unit, plan.words + dims] = sign
        down[plan.match, unit] = GAIN_MATCH
