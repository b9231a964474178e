"""A pruned ranker is an ordinary smaller LLaMA, and what left is what moved the scores least."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ranking.learn.batches import Batch
from ranking.learn.loop import Labels, answers, layers_of
from ranking.learn.narrow import narrowed
from ranking.learn.prune import Keep, PruneError, prune, pruned_config, weights_of, worth
from ranking.learn.questions import Ground
from ranking.prefill.engine import Engine
from ranking.prefill.request import Request
from retrieval.llama import load_llama


@pytest.fixture
def model(teacher_folder: Path) -> LlamaForCausalLM:
    found = load_llama(teacher_folder, causal_lm=True)
    assert isinstance(found, LlamaForCausalLM)
    return found.eval()


@pytest.fixture(scope="module")
def batches(ground: Ground) -> list[Batch]:
    return [ground.writer.write(ground.pools, [("label", group) for group in range(first, first + 4)]) for first in (0, 4, 8)]


def scores(model: LlamaForCausalLM, labels: Labels, batches: list[Batch]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([answers(layers_of(model), labels, batch)[1] for batch in batches])


def test_zeroed_structures_are_the_ones_that_leave_and_nothing_else_changes(
    model: LlamaForCausalLM, labels: Labels, batches: list[Batch]
) -> None:
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for number, layer in enumerate(masked.model.layers):
            layer.mlp.down_proj.weight[:, [number, 5, 17, 40]] = 0
            group = number % 2
            layer.self_attn.o_proj.weight[:, group * 16 : (group + 1) * 16] = 0
        masked.model.layers[1].mlp.down_proj.weight.zero_()
        masked.model.layers[1].self_attn.o_proj.weight.zero_()
    smaller = prune(masked, Keep(mlp=92, kv_heads=1, layers=2), labels, batches, most=0.6)
    config = smaller.config
    assert (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (92, 1, 2, 8)
    assert len(smaller.model.layers) == 2 and len(masked.model.layers) == 3
    torch.testing.assert_close(scores(smaller, labels, batches), scores(masked, labels, batches), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores(masked, labels, batches), scores(model, labels, batches), atol=1e-2)


@pytest.mark.parametrize("keep", [Keep(mlp=64, kv_heads=1), Keep(hidden=24, mlp=64)])
def test_stock_transformers_loads_the_folder_and_gives_the_logits_of_the_engine(
    model: LlamaForCausalLM, labels: Labels, batches: list[Batch], tmp_path: Path, keep: Keep
) -> None:
    prune(model, keep, labels, batches, most=0.6).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    asked = Request([3, 9, 4, 11], [[7, 8], [5, 6, 12]])
    ours = Engine(load_llama(tmp_path, causal_lm=True), labels["label"]).score([asked])[0]
    with torch.no_grad():
        theirs = [stock(torch.tensor([[*asked.prefix, *item]])).logits[0, -1, list(labels["label"])] for item in asked.items]
    np.testing.assert_allclose(ours, torch.stack(theirs).numpy(), atol=1e-4)


def test_turning_the_residual_stream_changes_no_score_and_dims_that_are_felt_stay(
    model: LlamaForCausalLM, labels: Labels, batches: list[Batch]
) -> None:
    with torch.no_grad():
        for norm in (model.model.norm, model.model.layers[0].input_layernorm, model.model.layers[2].post_attention_layernorm):
            norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))  # gains that a rotation must not forget
    told = scores(model, labels, batches)
    turned = narrowed(model, model.config, labels, batches, seed=0)
    assert not torch.allclose(turned.get_input_embeddings().weight, model.get_input_embeddings().weight, atol=0.1)
    torch.testing.assert_close(scores(turned, labels, batches), told, rtol=1e-3, atol=1e-3)
    found = {}
    for width in (8, 24):
        smaller = prune(model, Keep(hidden=width), labels, batches, most=1.0)
        assert smaller.config.hidden_size == width and smaller.config.head_dim == model.config.head_dim
        found[width] = float(torch.corrcoef(torch.stack([scores(smaller, labels, batches), told]))[0, 1])
    assert found[24] > max(0.8, found[8])


def test_worth_is_the_squared_effect_of_a_gate(model: LlamaForCausalLM, labels: Labels, ground: Ground) -> None:
    """With one candidate the random sign cancels, so the estimate must be the derivative by a gate, squared."""
    whole = ground.writer.write(ground.pools, [("label", 0)])
    first = whole.requests[0]
    batch = Batch([replace(first, items=first.items[:1])], whole.tasks, whole.label[:1])
    neurons, heads = worth(model, labels, [batch], seed=0)
    at, step = int(neurons[1].argmax()), 2e-2
    layer, moved = model.model.layers[1], []
    with torch.no_grad():
        for weight, columns in ((layer.mlp.down_proj.weight, slice(at, at + 1)), (layer.self_attn.o_proj.weight, slice(16, 32))):
            ends = []
            for gate in (1 + step, 1 - step):
                kept = weight[:, columns].clone()
                weight[:, columns] *= gate
                ends.append(float(scores(model, labels, [batch])))
                weight[:, columns] = kept
            moved.append(((ends[0] - ends[1]) / (2 * step)) ** 2)
    np.testing.assert_allclose([float(neurons[1, at]), float(heads[1, 1])], moved, rtol=0.05)


def test_what_matters_least_leaves(model: LlamaForCausalLM, labels: Labels, batches: list[Batch]) -> None:
    """Choosing by worth costs less than choosing the opposite."""
    neurons, _ = worth(model, labels, batches, seed=0)
    told = scores(model, labels, batches)
    damage = []
    for largest in (False, True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for layer, row in zip(other.model.layers, neurons):
                layer.mlp.down_proj.weight[:, row.topk(32, largest=largest).indices] = 0
        damage.append(float((scores(other, labels, batches) - told).square().mean()))
    assert damage[0] < 0.2 * damage[1]


def test_a_step_takes_at_most_thirty_percent_and_only_what_stock_models_can_lose(model: LlamaForCausalLM, labels: Labels) -> None:
    total, body = weights_of(model.config)
    assert total == sum(weight.numel() for weight in model.parameters())
    assert total - body == model.get_input_embeddings().weight.numel()
    with pytest.raises(PruneError, match="at most 30% a step"):
        pruned_config(model.config, Keep(mlp=24))
    for keep in (Keep(), Keep(mlp=0), Keep(layers=4), Keep(kv_heads=-1)):
        with pytest.raises(PruneError, match="cannot keep"):
            pruned_config(model.config, keep)
    odd = copy.deepcopy(model.config)
    odd.num_attention_heads, odd.num_key_value_heads, odd.head_dim = 4, 4, 8
    with pytest.raises(PruneError, match=r"keep one of \[1, 2, 4\]"):
        pruned_config(odd, Keep(kv_heads=3))
    wide = copy.deepcopy(model.config)
    wide.hidden_size, wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim = 96, 8, 8, 12
    with pytest.raises(PruneError, match=r"8 query heads do not divide 90.* keep a multiple of 24"):
        pruned_config(wide, Keep(hidden=90, kv_heads=3), most=1.0)
    assert pruned_config(wide, Keep(hidden=72, kv_heads=3), most=1.0).num_attention_heads == 3
    with pytest.raises(PruneError, match="no groups"):
        prune(model, Keep(mlp=72), labels, [])
