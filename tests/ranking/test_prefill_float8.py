"""FP8 layers against the same values multiplied in float32, as single layers and as whole engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranking.learn.quantize import rounded
from ranking.prefill.engine import Engine
from ranking.prefill.float8 import Float8, Float8Linear, Float8Missing, Scaled, check_capability, check_device, scaled
from ranking.prefill.joint import TOGETHER, weight_bytes
from ranking.prefill.load import load_engine, probabilities, ready
from ranking.prefill.request import Request
from ranking.prefill.weights import Block, Weights

LABELS = (5, 9)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_keep_their_largest_value_and_zeros_stay_zero() -> None:
    rows = drawn(6, 64).bfloat16() * torch.tensor([1e-6, 1e-3, 1, 10, 1e3, 0], dtype=torch.bfloat16)[:, None]
    small = scaled(rows)
    assert small.values.dtype == torch.float8_e4m3fn and small.scales.shape == (6, 1)
    largest = rows.float().abs().amax(1)
    torch.testing.assert_close(small.wide().abs().amax(1), largest, rtol=1e-6, atol=0)
    assert bool(((small.wide() - rows.float()).abs().amax(1) <= largest * 2**-4).all()) and not small.wide()[5].any()
    folder = rounded(drawn(200, 99) * torch.logspace(-6, 6, 200)[:, None], "fp8")
    assert torch.equal(scaled(folder.bfloat16()).wide(), folder), "what a folder holds is what an engine of bfloat16 multiplies"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_is_the_float32_product_of_the_small_values_rounded_once(rows: int, bias: bool) -> None:
    weight, x = scaled(drawn(48, 64, seed=1)), drawn(rows, 64).bfloat16() * 3
    added = drawn(48, seed=2).bfloat16() if bias else None
    layer, out = Float8(weight.values, weight.scales, added), torch.empty(rows, 48, dtype=torch.bfloat16)
    want = scaled(x).wide() @ weight.wide().T + (0 if added is None else added.float())
    layer.into(x, out)
    allowed = 2**-8 * want.abs() + 1e-4
    assert bool(((out.float() - want).abs() <= (2 if bias else 1) * allowed).all())
    again, before = torch.empty_like(out), drawn(rows, 48, seed=3).bfloat16()
    layer.into(layer.ready(x), again)
    assert torch.equal(again, out)
    residual = before.clone()
    layer.onto(x, residual)
    assert torch.equal(residual, before + out)
    assert float((out.float() - x.float() @ drawn(48, 64, seed=1).T).abs().max()) > 0.1, "it is not the wide product"


class Slow:
    """The honest twin of a layer: the same small values, multiplied in float32."""

    def __init__(self, layer: Float8) -> None:
        self.weight, self.bias, self._wide = layer.weight, layer.bias, Scaled(layer.weight, layer.scale).wide()

    def ready(self, x: torch.Tensor) -> Scaled:
        return scaled(x)

    def into(self, x: torch.Tensor | Scaled, out: torch.Tensor) -> None:
        rows = x if isinstance(x, Scaled) else scaled(x)
        out.copy_(rows.wide() @ self._wide.T + (0 if self.bias is None else self.bias.float()))

    def onto(self, x: torch.Tensor | Scaled, out: torch.Tensor) -> None:
        made = torch.empty_like(out)
        self.into(x, made)
        out.add_(made)


def slowed(block: Block) -> Block:
    one = {name: getattr(block, name) for name in ("q", "k", "v", "o", "down")}
    joined = {name: getattr(block, name) for name in ("qk", "gate_up")}
    return replace(
        block,
        **{name: Slow(part) for name, part in one.items()},
        **{name: tuple(map(Slow, parts)) for name, parts in joined.items()},
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_engine_equals_its_slow_twin(kind: str, toy: Any) -> None:
    """Within a thousandth of the largest logit: only the order of a float32 sum differs, before it is rounded to bfloat16."""
    asked, model = toy.request(70, [3, 1, 9, 3, 5]), ready(toy.model(kind).to(torch.bfloat16), float8=True)
    engine, twin = Engine(model, LABELS), Engine(model, LABELS)
    blocks = engine._lean.weights.blocks
    assert engine.loop == "lean" and len(blocks[0].qk) == len(blocks[0].gate_up) == 1 and isinstance(blocks[0].qk[0], Float8)
    twin._lean.weights = replace(twin._lean.weights, blocks=tuple(map(slowed, blocks)))
    want = twin.score([asked])[0]
    assert want.dtype == np.float32
    for _ in ("cold", "warm"):
        np.testing.assert_allclose(engine.score([asked])[0], want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_engine_is_near_the_models_own_forward_over_the_same_layers_and_the_model_in_float32(kind: str, toy: Any) -> None:
    """Bfloat16 between the layers differs, which can move a value by a step of e4m3: an eighth of it. The toys are 32 wide, so
    few errors cancel."""
    asked, model = toy.request(70, [3, 1, 9, 3, 5]), ready(toy.model(kind).to(torch.bfloat16), float8=True)
    truth, found = toy.alone(toy.model(kind), asked), Engine(model, LABELS).score([asked])[0]
    largest = float(np.abs(truth).max())
    assert np.abs(found - toy.alone(model, asked)).max() < 0.15 * largest
    assert 0 < np.abs(found - truth).max() < 0.3 * largest


def test_deterministic_scores_in_float8_do_not_know_their_neighbours(toy: Any) -> None:
    engine = Engine(ready(toy.model().to(torch.bfloat16), float8=True), LABELS, deterministic=True)
    asked = toy.request(70, [3, 1, 9])
    both = engine.score([toy.request(20, [4], 3), asked])[1]
    alone = [engine.score([Request(asked.prefix, [item])])[0][0] for item in asked.items]
    np.testing.assert_array_equal(np.array(alone), both)


def test_weights_are_held_once_and_in_one_byte(toy: Any) -> None:
    model = toy.model().to(torch.bfloat16)
    wide = weight_bytes(model)
    layers = [layer.get_submodule(name) for layer in model.model.layers for names in TOGETHER for name in names]
    weights, outputs = (sum(count) for count in zip(*((part.weight.numel(), len(part.weight)) for part in layers)))
    ready(model, float8=True)
    assert wide - weight_bytes(model) == weights - 4 * outputs
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in model.parameters()}
    assert sum(storages.values()) == weight_bytes(model)
    views = Weights.of(model)
    assert views is not None and all(block.v.weight.untyped_storage().data_ptr() in storages for block in views.blocks)
    head = model.get_output_embeddings()
    assert not isinstance(head, Float8Linear) and head.weight.dtype == torch.bfloat16


def test_a_folder_is_served_in_float8(toy: Any, tmp_path: Path) -> None:
    model, asked = toy.model(), toy.request(20, [4, 2, 4])
    model.save_pretrained(tmp_path)
    engine = load_engine(tmp_path, LABELS, arithmetic="fp8")
    found = probabilities(engine, asked.prefix, asked.items)
    want = torch.softmax(torch.from_numpy(toy.alone(model, asked)), -1).numpy()
    assert 0 < np.abs(found - want).max() < 0.2


def test_what_cannot_be_float8_says_why_and_stays_as_it_was(toy: Any) -> None:
    narrow = toy.model(intermediate_size=40).to(torch.bfloat16)
    for model, reason in ((narrow, "multiples of 16, got a weight of 40x32"), (toy.model(), "bfloat16 model, got torch.float32")):
        with pytest.raises(Float8Missing, match=reason):
            ready(model, float8=True)
        assert not any(isinstance(part, Float8Linear) for part in model.modules())
    check_capability((8, 9))
    check_capability((9, 0))
    with pytest.raises(Float8Missing, match=r"capability 8\.9 .* this one has 8\.6"):
        check_capability((8, 6))
    with pytest.raises(Float8Missing, match="not on mps"):
        check_device(torch.device("mps"))
