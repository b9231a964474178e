"""MLP neurons, key heads with their query heads, layers and hidden dims leave a ranker; an ordinary smaller LLaMA is left.

What a structure is worth is measured on real groups, by what its absence does to the scores (not to the loss: near convergence
its gradient is noise, and it would need labels):

    layers    left out one after another, each time the one whose absence moves the scores least; exact, there are few of them
    widths    first-order Taylor (arXiv 1906.10771): for a structure S, (sum over its output weights of w * d/dw sum_i e_i z_i)^2
              with random signs e_i = +-1, added up over batches. w * d/dw summed over output columns is the derivative by a gate
              on S; the signs make the square an unbiased estimate of sum_i (change of z_i)^2: candidates do not cancel.
    hidden    `ranking.learn.narrow`, first of all

Widths are uniform over the layers, so that stock transformers loads the result; each layer keeps its own best structures.

Legend: L layers, M neurons, G key heads, H query heads, D dims of a head, n candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from index.errors import BrewlineError
from ranking.learn.batches import Batch
from ranking.learn.loop import Labels, answers, layers_of
from ranking.learn.narrow import narrowed

MOST = 0.3
"""Share of the weights outside the embeddings that one step may take; more costs what training does not bring back."""


Places = dict[str, tuple[Tensor | None, Tensor | None]]
"""Projection -> the outputs and the inputs that stay (None: all)."""


class PruneError(BrewlineError):
    """A model cannot be cut to the sizes that were asked for."""


@dataclass(frozen=True)
class Keep:
    """How many of each structure are left; None: all of them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    mlp: int | None = None
    kv_heads: int | None = None
    layers: int | None = None
    hidden: int | None = None


@dataclass(frozen=True)
class Kept:
    """Which structures stay, in their old order: layers [l], and for each of these neurons [m] and key heads [g]."""

    layers: list[int]
    neurons: list[Tensor]
    heads: list[Tensor]


def pruned_config(config: LlamaConfig, keep: Keep, most: float = MOST) -> LlamaConfig:
    """The configuration of the smaller model. Raises PruneError if a size cannot be, or if more than `most` would leave."""
    had = {"mlp": config.intermediate_size, "kv_heads": config.num_key_value_heads, "layers": config.num_hidden_layers}
    had["hidden"] = config.hidden_size
    asked = asdict(keep)
    wanted = {name: size if asked[name] is None else asked[name] for name, size in had.items()}
    wrong = [f"{name} {wanted[name]} of {had[name]}" for name in had if not 0 < wanted[name] <= had[name]]
    if wrong or wanted == had:
        raise PruneError(f"cannot keep {', '.join(wrong) or 'everything'}; each of {had} may get smaller, and one must")
    each = config.num_attention_heads // config.num_key_value_heads
    if wanted["hidden"] % (wanted["kv_heads"] * each):
        fits = [count for count in range(1, had["kv_heads"] + 1) if wanted["hidden"] % (count * each) == 0]
        raise PruneError(
            f"{wanted['kv_heads']} key heads leave {wanted['kv_heads'] * each} query heads, which do not divide the width "
            f"{wanted['hidden']}, and stock transformers refuses that; keep one of {fits}"
        )
    if wanted["hidden"] < had["hidden"] and wanted["hidden"] % config.num_attention_heads:
        step = math.lcm(config.num_attention_heads, wanted["kv_heads"] * each)
        raise PruneError(
            f"hidden dims leave before heads do, and {config.num_attention_heads} query heads do not divide {wanted['hidden']}, "
            f"which stock transformers refuses; keep a multiple of {step}, or let heads leave in a step before"
        )
    facts = config.to_dict()
    facts |= {"intermediate_size": wanted["mlp"], "num_hidden_layers": wanted["layers"], "head_dim": config.head_dim}
    facts |= {"num_key_value_heads": wanted["kv_heads"], "num_attention_heads": wanted["kv_heads"] * each}
    facts["hidden_size"] = wanted["hidden"]
    smaller = LlamaConfig(**facts)
    before, after = weights_of(config)[1], weights_of(smaller)[1]
    if after < (1 - most) * before:
        raise PruneError(
            f"{before - after:,} of {before:,} weights outside the embeddings would leave at once ({1 - after / before:.0%}); "
            f"at most {most:.0%} a step: cut in several steps with distillation between (or say one_shot: true to see the loss)"
        )
    return smaller


def weights_of(config: LlamaConfig) -> tuple[int, int]:
    """How many weights a model has, and how many of them outside the embeddings; nothing is allocated."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    total = sum(weight.numel() for weight in model.parameters())
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    return total, total - sum(ends.values())


def prune(
    model: LlamaForCausalLM, keep: Keep, labels: Labels, batches: Sequence[Batch], *, seed: int = 0, most: float = MOST
) -> LlamaForCausalLM:
    """A smaller copy of the model, in its order of layers and structures; the model itself is as before.

    `batches` are groups from training. Raises PruneError.
    """
    config = pruned_config(model.config, keep, most)
    if not batches:
        raise PruneError("no groups to measure on what each structure is worth")
    if config.hidden_size < model.config.hidden_size:
        narrow = LlamaConfig(**(model.config.to_dict() | {"hidden_size": config.hidden_size}))
        model = narrowed(model, narrow, labels, batches, seed)
    return cut(model, config, choose(model, config, labels, batches, seed))


def choose(model: LlamaForCausalLM, config: LlamaConfig, labels: Labels, batches: Sequence[Batch], seed: int) -> Kept:
    """The structures that matter most on the batches, as many as `config` has."""
    every = model.model.layers
    layers = _layers_kept(model, config.num_hidden_layers, labels, batches)
    model.model.layers = nn.ModuleList([every[number] for number in layers])
    try:
        neurons, heads = worth(model, labels, batches, seed)
    finally:
        model.model.layers = every
    best = lambda rows, count: [row.topk(count).indices.sort().values for row in rows]  # noqa: E731 - used twice, here alone
    return Kept(layers, best(neurons, config.intermediate_size), best(heads, config.num_key_value_heads))


def worth(model: LlamaForCausalLM, labels: Labels, batches: Sequence[Batch], seed: int) -> tuple[Tensor, Tensor]:
    """What each neuron [L, M] and each key head with its query heads [L, G] moves the scores of the batches, squared."""
    config, layers = model.config, layers_of(model)
    draw = torch.Generator().manual_seed(seed)
    ends = [(layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight) for layer in model.model.layers]
    neurons = torch.zeros(len(ends), config.intermediate_size)
    heads = torch.zeros(len(ends), config.num_key_value_heads)
    for batch in batches:
        _, logit = answers(layers, labels, batch)
        signs = torch.randint(0, 2, logit.shape, generator=draw).to(logit) * 2 - 1
        found = torch.autograd.grad((signs * logit).sum(), [weight for pair in ends for weight in pair])
        for number, (down, out) in enumerate(ends):
            gates = (down.detach() * found[2 * number]).sum(0)
            neurons[number] += gates.square().cpu()
            gates = (out.detach() * found[2 * number + 1]).sum(0).view(config.num_key_value_heads, -1).sum(1)
            heads[number] += gates.square().cpu()
    return neurons, heads


def _layers_kept(model: LlamaForCausalLM, count: int, labels: Labels, batches: Sequence[Batch]) -> list[int]:
    """The layers [count] that are left when the least missed one leaves, again and again."""
    every = model.model.layers
    left = list(range(len(every)))
    try:
        with torch.no_grad():
            whole = [answers(layers_of(model), labels, batch)[1] for batch in batches]
            while len(left) > count:
                missed = {}
                for number in left:
                    model.model.layers = nn.ModuleList([every[other] for other in left if other != number])
                    without = [answers(layers_of(model), labels, batch)[1] for batch in batches]
                    missed[number] = sum(float((one - two).square().sum()) for one, two in zip(whole, without))
                left.remove(min(left, key=lambda number: missed[number]))
    finally:
        model.model.layers = every
    return left


def cut(model: LlamaForCausalLM, config: LlamaConfig, kept: Kept) -> LlamaForCausalLM:
    """A new model of that configuration with the weights of the structures that stay."""
    smaller = LlamaForCausalLM(config).to(model.device, model.dtype).eval()
    dims = config.head_dim
    each = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for part in ("model.embed_tokens", "model.norm", "lm_head"):
            smaller.get_submodule(part).weight.copy_(model.get_submodule(part).weight)
        for number, source in enumerate(kept.layers):
            keys = _spread(kept.heads[number], dims)
            places: Places = {"k_proj": (keys, None), "v_proj": (keys, None)}
            queries = _spread(kept.heads[number], each * dims)
            places |= {"q_proj": (queries, None), "o_proj": (None, queries)}
            neurons = kept.neurons[number]
            places |= {"gate_proj": (neurons, None), "up_proj": (neurons, None), "down_proj": (None, neurons)}
            _copy(smaller.model.layers[number], model.model.layers[source], places)
    return smaller


def _spread(groups: Tensor, size: int) -> Tensor:
    """The rows of groups of `size` neighbours each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _copy(target: nn.Module, source: nn.Module, places: Places) -> None:
    """Every weight of a layer, of the named projections the (outputs, inputs) that stay."""
    held = dict(source.named_parameters())
    for name, weight in target.named_parameters():
        outputs, inputs = places.get(name.split(".")[-2], (None, None))
        found: Tensor = held[name]
        if outputs is not None:
            found = found[outputs.to(found.device)]
        if inputs is not None and found.ndim > 1:
            found = found[:, inputs.to(found.device)]
        weight.copy_(found)
