"""The engine's honest twins: many items in one pass score as each alone through the plain Hugging Face forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ranking.prefill.engine import Engine
from ranking.prefill.errors import LabelError, UnknownToken
from ranking.prefill.request import Limits, Request
from ranking.prefill.weights import UnsupportedModel

LABELS = (5, 9, 40)
ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 500000.0,
    },
}


def llama(rope: str = "default", kv: int = 2, tied: bool = True, layers: int = 3, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters=ROPES[rope],
        attention_bias=bias,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def alone(model: LlamaForCausalLM, request: Request) -> np.ndarray:
    """One plain forward per item: the meaning of a score."""
    found = []
    with torch.inference_mode():
        for item in request.items:
            logits = model(torch.tensor([[*request.prefix, *item]])).logits
            found.append(logits[0, -1, list(LABELS)].float().numpy())
    return np.array(found)


def request(prefix: int, lengths: list[int], seed: int = 0) -> Request:
    rng = np.random.default_rng(seed)
    return Request(rng.integers(0, 50, prefix).tolist(), [rng.integers(0, 50, n).tolist() for n in lengths])


@pytest.mark.parametrize("backend", ["cpu_flash", "reference"])
@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_many_items_in_one_pass_equal_one_item_per_pass(backend: str, rope: str, kv: int) -> None:
    model = llama(rope, kv)
    asked = request(13, [3, 7, 1, 7, 4, 3, 12])
    got = Engine(model, LABELS, backend=backend).score([asked])[0]
    assert got.dtype == np.float32 and got.shape == (7, 3)
    np.testing.assert_allclose(got, alone(model, asked), atol=1e-5)


@pytest.mark.parametrize(("tied", "bias", "layers"), [(False, False, 2), (True, True, 2), (True, False, 1)])
def test_untied_head_biases_and_a_single_layer(tied: bool, bias: bool, layers: int) -> None:
    model = llama(tied=tied, bias=bias, layers=layers)
    if bias:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias"):
                    weight.normal_()
    asked = request(5, [2, 3])
    np.testing.assert_allclose(Engine(model, LABELS).score([asked])[0], alone(model, asked), atol=1e-5)


@pytest.mark.parametrize(("prefix", "lengths"), [(1, [1]), (1, [1, 1]), (9, [1]), (1, [6]), (17, [1, 2, 3, 4, 5, 6])])
def test_the_smallest_and_odd_shapes(prefix: int, lengths: list[int]) -> None:
    model, asked = llama(), request(prefix, lengths)
    np.testing.assert_allclose(Engine(model, LABELS).score([asked])[0], alone(model, asked), atol=1e-5)


@pytest.mark.parametrize("budget", [1, 12, 25, 40])
def test_chunked_equals_whole(budget: int) -> None:
    model = llama()
    asked = [request(9, [3, 5, 2, 5, 3, 3, 8], 1), request(4, [], 2), request(6, [2, 2, 7], 3), request(11, [4], 4)]
    whole = Engine(model, LABELS, limits=Limits(max_tokens=10_000)).score(asked)
    chunked = Engine(model, LABELS, limits=Limits(max_tokens=budget)).score(asked)
    assert [len(part) for part in chunked] == [7, 0, 3, 1]
    for left, right, one in zip(whole, chunked, asked):
        np.testing.assert_allclose(left, right, atol=1e-5)
        if one.items:
            np.testing.assert_allclose(left, alone(model, one), atol=1e-5)


def test_a_neighbours_change_changes_nothing_bitwise() -> None:
    engine, asked = Engine(llama(), LABELS), request(8, [4, 4, 4, 4])
    changed = Request(asked.prefix, [[7, 7, 1, 3], *asked.items[1:]])
    before, after = engine.score([asked])[0], engine.score([changed])[0]
    assert not np.array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1:], after[1:])


def test_order_duplicates_and_company_do_not_matter() -> None:
    engine, asked = Engine(llama(), LABELS), request(8, [4, 2, 5, 4, 9])
    base = engine.score([asked])[0]
    order = [3, 0, 4, 2, 1]
    shuffled = engine.score([Request(asked.prefix, [asked.items[n] for n in order])])[0]
    np.testing.assert_allclose(shuffled, base[order], atol=1e-5)
    doubled = engine.score([Request(asked.prefix, [*asked.items, *asked.items])])[0]
    np.testing.assert_array_equal(doubled[:5], doubled[5:])
    np.testing.assert_allclose(doubled[:5], base, atol=1e-5)
    beside = engine.score([request(30, [3, 3], 9), asked])[1]
    np.testing.assert_allclose(beside, base, atol=1e-5)
    subset = engine.score([Request(asked.prefix, asked.items[2:3])])[0]
    np.testing.assert_allclose(subset, base[2:3], atol=1e-5)


def test_hoisting_the_common_beginning_is_invisible() -> None:
    model = llama()
    rest = request(6, [1, 4, 4, 2])
    asked = Request(rest.prefix, [[3, 1, 4, *item] for item in rest.items])
    np.testing.assert_allclose(Engine(model, LABELS).score([asked])[0], alone(model, asked), atol=1e-5)


def test_bfloat16_stays_near_float32() -> None:
    asked = request(20, [4, 6, 6])
    exact = Engine(llama(), LABELS).score([asked])[0]
    rounded = Engine(llama().to(torch.bfloat16), LABELS).score([asked])[0]
    assert rounded.dtype == np.float32
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_the_engine_reads_the_live_weights() -> None:
    model = llama(tied=False)
    engine, asked = Engine(model, LABELS), request(6, [3, 3])
    before = engine.score([asked])[0]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    after = engine.score([asked])[0]
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, alone(model, asked), atol=1e-5)


def test_no_buffer_grows_with_the_square_of_the_tokens() -> None:
    model = llama(layers=2)
    engine = Engine(model, LABELS, limits=Limits(max_tokens=100_000))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple) else (out,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return out

    sizes = []
    for items in (50, 200):
        largest = 0
        with Watch():
            engine.score([request(20, [6] * items)])
        sizes.append(largest)
    assert sizes[1] < 4.2 * sizes[0]


def test_what_cannot_be_scored_is_refused_by_type() -> None:
    model = llama()
    for labels in ((), (3, 3), (50,), (-1,)):
        with pytest.raises(LabelError):
            Engine(model, labels)
    with pytest.raises(UnknownToken, match="50"):
        Engine(model, LABELS).score([Request([1], [[50]])])
    small = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=32,
    )
    with pytest.raises(UnsupportedModel, match="looks back 32 tokens"):
        Engine(MistralForCausalLM(small), LABELS)
    with pytest.raises(UnsupportedModel, match="GPT2"):
        Engine(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)), LABELS)
