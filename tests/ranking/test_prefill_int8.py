"""Int8 layers against the same quantisation multiplied in float64, alone, on their edges and as whole engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranking.learn.quantize import rounded
from ranking.prefill.engine import Engine
from ranking.prefill.float8 import Scaled
from ranking.prefill.int8 import Int8, Int8Linear, Int8Missing, block_rows, check_device, on_grid, small_rows
from ranking.prefill.joint import TOGETHER, weight_bytes
from ranking.prefill.load import load_engine, probabilities, ready
from ranking.prefill.request import Limits, Request
from ranking.prefill.weights import Block, Weights, arithmetic_of
from ranking.prefill.workspace import Workspace
from retrieval.device import DeviceMissing
from retrieval.llama import CheckpointError, save_llama

LABELS = (5, 9)
KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8:
    small = on_grid(weight)
    return Int8(small.values, small.scales, bias, Workspace())


def exactly(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same quantisation spelled out, its sums in float64."""
    steps = (rows.abs().amax(1, keepdim=True) if len(rows) else rows[:, :1]).clamp_min(1e-30) / 127
    small = (rows * (1 / steps)).round()
    sums = (small.double() @ weight.double().T).float()
    return sums * steps * scale.T + (0 if bias is None else bias)


def test_rows_keep_their_largest_value_and_zeros_stay_zero() -> None:
    rows = drawn(6, 64) * torch.tensor([1e-25, 1e-3, 1, 10, 1e30, 0])[:, None]
    small = small_rows(rows, Workspace())
    assert small.values.dtype == torch.int8 and small.values.abs().amax(1).tolist() == [127] * 5 + [0]
    assert bool(((small.wide() - rows).abs() <= small.scales * 0.5001).all()) and not small.wide()[5].any()
    assert small_rows(rows[:0], Workspace()).values.shape == (0, 64)


def test_the_values_of_an_int8_folder_are_found_again_to_the_last_bit() -> None:
    wide = drawn(20_000, 9) * torch.logspace(-6, 6, 20_000)[:, None]
    wide[7] = 0
    folder, first = rounded(wide, "int8"), on_grid(wide)
    found = on_grid(folder)
    assert torch.equal(found.wide(), folder) and not torch.equal(folder, wide)
    assert torch.equal(found.values, first.values) and torch.equal(found.scales, first.scales), "nothing is rounded twice"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (7, 33), (1, 2), (5, 768)])
def test_a_product_is_that_of_the_small_values(outputs: int, inputs: int, rows: int, bias: bool) -> None:
    added = drawn(outputs, seed=2) if bias else None
    layer, x = layer_of(drawn(outputs, inputs, seed=1), added), drawn(rows, inputs) * 3
    want, before = exactly(x, layer.weight, layer.scale, added), drawn(rows, outputs, seed=3)
    out, joint, residual = torch.empty(rows, outputs), torch.zeros(rows, outputs + 4), before.clone()
    layer.into(x, out)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    layer.into(layer.ready(x), joint[:, 2:-2])
    assert torch.equal(joint[:, 2:-2], out) and not joint[:, :2].any() and not joint[:, -2:].any()
    layer.onto(x, residual)
    torch.testing.assert_close(residual, before + want, rtol=1e-6, atol=2e-5)
    if rows == 40 and inputs > 2:
        assert float((out - x @ drawn(outputs, inputs, seed=1).T - (0 if added is None else added)).abs().max()) > 1e-2


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible_in_its_row_alone(wrong: float) -> None:
    layer, x = layer_of(drawn(48, 64, seed=1), drawn(48, seed=2)), drawn(5, 64)
    clean, out, residual = torch.empty(5, 48), torch.empty(5, 48), torch.zeros(5, 48)
    layer.into(x, clean)
    x[3, 17] = wrong
    layer.into(x, out)
    layer.onto(x, residual)
    others = [0, 1, 2, 4]
    assert not out[3].isfinite().any() and not residual[3].isfinite().any() and torch.equal(out[others], clean[others])
    weight = drawn(48, 64, seed=1)
    weight[9, 2] = wrong
    layer_of(weight).into(drawn(5, 64), out)
    assert not out[:, 9].isfinite().any() and out[:, :9].isfinite().all()


class Slow:
    """The honest twin of a layer: the quantisation spelled out."""

    def __init__(self, layer: Int8) -> None:
        self.weight, self.bias, self._scale = layer.weight, layer.bias, layer.scale

    def ready(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(exactly(x, self.weight, self._scale, self.bias))

    def onto(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.add_(exactly(x, self.weight, self._scale, self.bias))


def slowed(block: Block) -> Block:
    one = {name: Slow(getattr(block, name)) for name in ("q", "k", "v", "o", "down")}
    return replace(block, **one, **{name: tuple(map(Slow, getattr(block, name))) for name in ("qk", "gate_up")})


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_equals_its_slow_twin(kind: str, toy: Any) -> None:
    """But for float32 sums that a last bit may take to the next of 127 steps: a hundredth of the largest logit."""
    asked, model = toy.request(70, [3, 1, 9, 3, 5]), ready(toy.model(kind), int8=True)
    engine, twin = Engine(model, LABELS), Engine(model, LABELS)
    blocks = engine._lean.weights.blocks
    assert engine.loop == "lean" and len(blocks[0].qk) == len(blocks[0].gate_up) == 1 and isinstance(blocks[0].qk[0], Int8)
    twin._lean.weights = replace(twin._lean.weights, blocks=tuple(map(slowed, blocks)))
    want = twin.score([asked])[0]
    for _ in ("cold", "warm"):
        np.testing.assert_allclose(engine.score([asked])[0], want, atol=1e-2 * np.abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_is_near_the_models_own_forward_over_the_same_layers_and_the_model_in_float32(kind: str, toy: Any) -> None:
    """The toys are 32 wide, so few errors cancel."""
    asked, model = toy.request(70, [3, 1, 9, 3, 5]), ready(toy.model(kind), int8=True)
    truth, found = toy.alone(toy.model(kind), asked), Engine(model, LABELS).score([asked])[0]
    largest = float(np.abs(truth).max())
    assert np.abs(found - toy.alone(model, asked)).max() < 0.01 * largest
    assert 1e-4 * largest < np.abs(found - truth).max() < 0.3 * largest


@pytest.mark.parametrize("deterministic", [False, True])
def test_company_order_chunks_and_the_cache_change_nothing(deterministic: bool, toy: Any) -> None:
    model, asked = ready(toy.model("qwen2"), int8=True), toy.request(150, [6, 3, 6, 11, 3, 2])
    engine = Engine(model, LABELS, deterministic=deterministic)
    base = engine.score([asked])[0]
    turned = engine.score([Request(asked.prefix, asked.items[::-1])])[0][::-1]
    company = engine.score([toy.request(20, [4], 3), asked])[1]
    alone = np.array([engine.score([Request(asked.prefix, [item])])[0][0] for item in asked.items])
    assert engine.stats.hits > 3
    chunked = Engine(model, LABELS, deterministic=deterministic, limits=Limits(max_tokens=80), cache_bytes=0).score([asked])[0]
    grown = Engine(model, LABELS, deterministic=deterministic)
    grown.prefill(asked.prefix[:130])
    for found in (turned, company, alone, chunked, grown.score([asked])[0]):
        np.testing.assert_allclose(found, base, atol=0 if deterministic else 0.01 * np.abs(base).max(), rtol=0)
    assert grown.stats.partial == 1


def test_keys_of_int8_and_float32_have_other_names_and_engines_of_one_model_other_buffers(toy: Any) -> None:
    wide, small = toy.model(), ready(toy.model(), int8=True)
    one, two, other = Engine(small, LABELS, revision="7"), Engine(small, LABELS, revision="7"), Engine(wide, LABELS, revision="7")
    tokens = np.arange(100)
    assert one.cache._names(tokens) == two.cache._names(tokens) and not {*one.cache._names(tokens)} & {
        *other.cache._names(tokens)
    }
    spaces = [
        {id(part.space) for block in engine._lean.weights.blocks for part in (block.v, block.down)} for engine in (one, two)
    ]
    assert len(spaces[0]) == len(spaces[1]) == 1 and spaces[0] != spaces[1]
    asked = toy.request(70, [3, 1])
    before = other.score([asked])[0]
    ready(wide, int8=True)
    assert np.abs(other.score([asked])[0] - before).max() > 1e-4 and other.stats.misses == 2, "an engine follows its model"


def test_weights_are_held_once_and_in_one_byte_and_the_rest_stays(toy: Any) -> None:
    model, before = toy.model(), toy.model()
    layers = [layer.get_submodule(name) for layer in model.model.layers for names in TOGETHER for name in names]
    weights, outputs = (sum(count) for count in zip(*((part.weight.numel(), len(part.weight)) for part in layers)))
    wide = weight_bytes(model)
    ready(model, int8=True)
    assert wide - weight_bytes(model) == 3 * weights - 4 * outputs and arithmetic_of(model) == "int8"
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in model.parameters()}
    assert sum(storages.values()) == weight_bytes(model)
    views = Weights.of(model)
    assert views is not None and all(block.v.weight.untyped_storage().data_ptr() in storages for block in views.blocks)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(model, part)().weight, getattr(before, part)().weight)


def test_a_folder_is_served_in_int8_only_when_asked(toy: Any, tmp_path: Path) -> None:
    model, asked = toy.model(), toy.request(20, [4, 2, 4])
    model.save_pretrained(tmp_path)
    found = probabilities(load_engine(tmp_path, LABELS, arithmetic="int8"), asked.prefix, asked.items)
    want = torch.softmax(torch.from_numpy(toy.alone(model, asked)), -1).numpy()
    assert 0 < np.abs(found - want).max() < 0.2
    assert load_engine(tmp_path, LABELS, arithmetic="int8").arithmetic == "int8" != load_engine(tmp_path, LABELS).arithmetic
    with pytest.raises(Int8Missing, match='not on cuda; take "fp8"'):
        check_device(torch.device("cuda"))
    with pytest.raises(DeviceMissing, match="cuda:99"):
        load_engine(tmp_path, LABELS, arithmetic="int8", device="cuda:99")


def test_what_cannot_be_int8_says_why_and_stays_as_it_was(toy: Any) -> None:
    thin, half = toy.model(intermediate_size=1), toy.model().to(torch.bfloat16)
    for model, reason in ((thin, "two columns or more"), (half, r"float32 model, got torch\.bfloat16")):
        with pytest.raises(Int8Missing, match=reason):
            ready(model, int8=True)
        assert not any(isinstance(part, Int8Linear) for part in model.modules())
    check_device(torch.device("cpu"))


def test_blocks_of_rows_fit_the_cache() -> None:
    assert [block_rows(mlp) for mlp in (48, 384, 768, 8192)] == [2048, 512, 256, 256]


def test_a_buffer_follows_its_shape_and_stays_in_place() -> None:
    space, place = Workspace(), (torch.float32, torch.device("cpu"))
    first = space.take("a", (4, 6), *place)
    for shape in ((4, 6), (2, 3), (4, 6)):
        again = space.take("a", shape, *place)
        assert again.shape == shape and again.data_ptr() == first.data_ptr()
    larger = space.take("a", (9, 9), *place)
    assert larger.shape == (9, 9) and space.take("a", (4, 6), *place).data_ptr() == larger.data_ptr()
    assert space.take("a", (4, 6), torch.int8, place[1]).dtype == torch.int8
    assert isinstance(small_rows(drawn(2, 4), space), Scaled)


def test_codes_are_not_saved_as_weights_and_do_not_follow_to_another_dtype(toy: Any, tmp_path: Path) -> None:
    small = ready(toy.model(), int8=True)
    with pytest.raises(CheckpointError, match="held in codes"):
        save_llama(small, tmp_path)
    engine = Engine(small, LABELS)
    small.to(torch.bfloat16)
    with pytest.raises(Int8Missing, match="stays float32"):
        engine.score([toy.request(20, [4, 2])])
    layer = small.model.layers[0].mlp.down_proj
    assert ready(toy.model(), int8=True).model.layers[0].mlp.down_proj(torch.zeros(0, layer.weight.shape[1])).shape == (
        0,
        len(layer.weight),
    )
