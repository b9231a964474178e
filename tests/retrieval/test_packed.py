"""Rows read without padding: the module's vectors, whatever stands beside a row, and the same night after night."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder, EncoderError, Pooling, ahead
from retrieval.features import Quantizer
from retrieval.llama import add_lora
from retrieval.packed import packed
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

VOCABULARY, BUDGET = 120, 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}


def bodies() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    return {
        "llama": LlamaModel(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        "llama3 scaling": LlamaModel(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
        "biases, wide heads": LlamaModel(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=16)),
        "no groups": LlamaModel(LlamaConfig(**(SHAPE | {"num_key_value_heads": 4}))),
        "mistral": MistralModel(MistralConfig(**SHAPE, sliding_window=None)),
        "qwen2": Qwen2Model(Qwen2Config(**SHAPE)),
        "qwen3": Qwen3Model(Qwen3Config(**SHAPE, head_dim=8)),
    }


def livened(model: PreTrainedModel) -> PreTrainedModel:
    """Gains away from 1 and biases away from 0, so that leaving one out is seen."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            elif "embed" not in name:
                weight.mul_(5)
    return model.eval()


@pytest.fixture
def writer(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> Writer:
    return Writer(tiny_tokens, tiny_quantizer, Budgets(item=BUDGET), ("like",))


def every_length() -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = rng.permutation([*range(1, BUDGET + 1), 1, 1, 7, 7, 7, BUDGET])
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


@pytest.mark.parametrize("name", list(bodies()))
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_packed_rows_have_the_vectors_of_the_module(name: str, pooling: Pooling, writer: Writer) -> None:
    model = livened(bodies()[name])
    rows = every_length()
    module = Encoder(model, writer, "f", {"pooling": pooling}).embed(rows)
    ours = Encoder(model, writer, "f", {"pooling": pooling}, packed=packed(model))
    np.testing.assert_allclose(ours.embed(rows), module, atol=1e-5, rtol=0)
    again = Encoder(model, writer, "f", {"pooling": pooling}).embed(rows)
    np.testing.assert_allclose(again, module, atol=1e-6, rtol=0)  # the module computes with the joint weights what it did before
    np.testing.assert_allclose(np.linalg.norm(ours.truncated(8).embed(rows), axis=1), 1, atol=1e-6)


def test_a_row_has_the_same_vector_whatever_stands_beside_it(writer: Writer) -> None:
    model = livened(bodies()["llama3 scaling"])
    encoder, rows = Encoder(model, writer, "f", {"pooling": "mean+last"}, packed=packed(model)), every_length() * 40
    whole = encoder.embed(rows)
    for some in (slice(0, 1), slice(3, 9), slice(50, 900)):
        np.testing.assert_allclose(encoder.embed(rows[some]), whole[some], atol=1e-6, rtol=0)
    np.testing.assert_allclose(encoder.embed(rows[::-1])[::-1], whole, atol=1e-6, rtol=0)


def test_threads_do_not_share_buffers(writer: Writer) -> None:
    model = livened(bodies()["llama"])
    encoder, rows = Encoder(model, writer, "f", {}, packed=packed(model)), every_length()
    alone = [encoder.embed(rows[start::4]) for start in range(4)]
    found: list[np.ndarray] = [np.zeros(0)] * 4

    def work(start: int) -> None:
        for _ in range(20):
            found[start] = encoder.embed(rows[start::4])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, alone):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=0)


def test_models_that_it_would_not_compute_are_left_to_the_module() -> None:
    assert packed(LlamaModel(LlamaConfig(**SHAPE, rope_parameters=DYNAMIC))) is None
    assert packed(LlamaModel(LlamaConfig(**SHAPE, hidden_act="gelu"))) is None
    assert packed(MistralModel(MistralConfig(**SHAPE, sliding_window=16))) is None
    wrapped = bodies()["llama"]
    add_lora(wrapped, rank=2)
    assert packed(wrapped) is None


def test_a_row_without_tokens_is_refused_and_no_rows_have_no_vectors(writer: Writer) -> None:
    model = bodies()["llama"]
    encoder = Encoder(model, writer, "f", {}, packed=packed(model))
    with pytest.raises(EncoderError, match="row 1 has no tokens"):
        encoder.embed([[1], []])
    assert encoder.embed([]).shape == (0, 32)


def test_bfloat16_is_another_encoder(encoder_folders: tuple[Path, Path]) -> None:
    plain, low = Encoder.load(encoder_folders[0]), Encoder.load(encoder_folders[0], precision="bfloat16")
    assert low.fingerprint == f"{plain.fingerprint}-bf16"
    rows = [row[:32] for row in every_length()]
    cosine = (plain.embed(rows) * low.embed(rows)).sum(1)
    assert cosine.min() > 0.999 and cosine.min() < 1 - 1e-7


def test_what_is_made_ahead_comes_in_order_one_at_a_time_and_its_error_is_raised() -> None:
    made: list[int] = []

    def make(part: slice) -> list[list[int]]:
        made.append(part.start)
        if part.start == 5:
            raise ValueError("five")
        return [[part.start]]

    seen = []
    with pytest.raises(ValueError, match="five"):
        for part, rows in ahead(make, [slice(n, n + 1) for n in range(9)]):
            assert len(made) <= part.start + 2
            seen.append(rows[0][0])
    assert seen == [0, 1, 2, 3, 4] and 6 not in made
    assert list(ahead(make, [])) == []


def test_items_in_parts_are_items_at_once(
    encoder_folders: tuple[Path, Path], tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.load(encoder_folders[0])
    items = [tiny_dataset.items[row] for row in range(len(tiny_dataset.items))]
    numbers = {"n_7d": np.arange(len(items), dtype=np.float64)}
    whole = encoder.items(items, numbers)
    monkeypatch.setattr("retrieval.encoder.ROWS_AHEAD", 7)
    told: list[tuple[int, int]] = []
    parts = encoder.items(items, numbers, lambda done, of: told.append((done, of)))
    np.testing.assert_allclose(parts, whole, atol=1e-6, rtol=0)
    assert told[-1] == (len(items), len(items)) and told == sorted(told)
