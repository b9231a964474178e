"""A quantized folder holds values of its format and nothing of its head; a head in few bits makes ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ranking.learn.quantize import Format, QuantizeError, check_fp8, head_study, projections, quantized, rounded, stored
from retrieval.llama import load_llama


@pytest.fixture
def model(teacher_folder: Path) -> LlamaForCausalLM:
    found = load_llama(teacher_folder, causal_lm=True)
    assert isinstance(found, LlamaForCausalLM)
    return found


@pytest.mark.parametrize(("to", "off"), [("bfloat16", 2**-8), ("int8", 1 / 254), ("fp8", 2**-4)])
def test_values_are_of_the_format_and_near(to: Format, off: float) -> None:
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 7)[:, None]
    small = rounded(weight, to)
    largest = weight.abs().amax(1, keepdim=True)
    assert float(((small - weight).abs() / largest).max()) <= off * 1.001
    assert float((small - weight).abs().max()) > 0
    torch.testing.assert_close(rounded(small, to), small, rtol=1e-6, atol=0)
    if to == "int8":
        assert all(len(row.unique()) <= 255 for row in small)
    assert not rounded(torch.zeros(2, 3), to).any()


@pytest.mark.parametrize("to", ["bfloat16", "int8"])
def test_projections_alone_are_quantized_and_the_folder_gives_the_same_scores(
    model: LlamaForCausalLM, to: Format, tmp_path: Path
) -> None:
    small = quantized(model, to)
    for name, weight in model.named_parameters():
        same = torch.equal(weight, small.get_parameter(name))
        assert same == (not name.removesuffix(".weight").endswith("_proj")), name
    assert len(projections(model)) == 7 * 3
    stored(small, to).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 9, 20]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, small.eval()(ids).logits, rtol=0, atol=0)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and again.lm_head.weight.dtype == torch.float32


def test_bfloat16_projections_take_half_the_bytes(model: LlamaForCausalLM, tmp_path: Path) -> None:
    sizes = []
    for to in ("int8", "bfloat16"):
        stored(model, to).save_pretrained(tmp_path / to)
        sizes.append((tmp_path / to / "model.safetensors").stat().st_size)
    weights = sum(part.weight.numel() for part in projections(model).values())
    assert sizes[0] - sizes[1] == pytest.approx(2 * weights, abs=200)
    assert next(iter(projections(model).values())).weight.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_fp8_without_a_gpu_says_what_it_needs() -> None:
    with pytest.raises(QuantizeError, match="needs a CUDA GPU"):
        check_fp8()


def test_a_head_in_few_bits_cannot_tell_items_apart() -> None:
    """States whose scores differ by less than a bfloat16 logit can say: order and calibration suffer as the bits go."""
    rng = np.random.default_rng(0)
    lists, size, dims = 60, 20, 64
    truth = rng.normal(size=lists * size)
    rows = rng.normal(size=(2, dims)).astype(np.float32)
    direction = (rows[0] - rows[1]) / np.square(rows[0] - rows[1]).sum()
    common = 24 * rows[0] / np.square(rows[0]).sum() + 24 * rows[1] / np.square(rows[1]).sum()  # both logits near 24
    state = (common + 0.15 * truth[:, None] * direction).astype(np.float32)
    label = (rng.random(len(truth)) < 1 / (1 + np.exp(-2 * truth))).astype(np.int8)
    found = {row.head: row for row in head_study(state, rows, label, np.repeat(np.arange(lists), size))}
    whole, half = found["float32"], found["bfloat16"]
    assert whole.distinct > 0.95 * len(truth) and whole.tied < 0.01
    assert half.distinct < 20 and half.tied > 0.1 and half.auc < whole.auc - 0.005
    assert found["bfloat16 rows, float32 product"].tied < 0.01
    assert whole.ece < 0.06
