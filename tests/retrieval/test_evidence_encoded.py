"""An encoder in the evaluation: each night's vectors are those of the encoder, and only changed prompts are read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder, save_encoder
from retrieval.evidence.baselines import Random
from retrieval.evidence.encoded import EncoderModel
from retrieval.evidence.evaluate import evaluate_retrieval
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer


@pytest.fixture(scope="module")
def encoder(tiny_tokens: Tokens, tiny_quantizer: Quantizer, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    torch.manual_seed(1)
    model = new_llama(Size(hidden=32, layers=1, heads=4, kv_heads=2, mlp=32), len(tiny_tokens), causal_lm=False)
    path: Path = tmp_path_factory.mktemp("evidence") / "encoder"
    save_encoder(path, model, Writer(tiny_tokens, tiny_quantizer, Budgets(), ("like",)), {"seed": 1})
    return Encoder.load(path)


def test_each_nights_vectors_are_the_encoders_with_that_nights_counts(encoder: Encoder, tiny_dataset: Dataset) -> None:
    cut = tiny_dataset.meta.cut_test
    records = [tiny_dataset.items[row] for row in range(len(tiny_dataset.items))]
    live, frozen = (EncoderModel(encoder, tiny_dataset, counts, cut) for counts in ("live", "frozen"))
    for moment in (cut, cut + DAY, cut + 2 * DAY):
        expected = encoder.items(records, Counts.from_dataset(tiny_dataset).as_of(moment))
        np.testing.assert_allclose(live.item_vectors(moment), expected, atol=2e-6)
    np.testing.assert_array_equal(frozen.item_vectors(cut), frozen.item_vectors(cut))
    assert frozen.encoded <= len(records) < live.encoded < 3 * len(records)


def test_frozen_counts_know_nothing_after_the_cut(encoder: Encoder, tiny_dataset: Dataset) -> None:
    cut = tiny_dataset.meta.cut_test
    total = EncoderModel(encoder, tiny_dataset, "frozen", cut).counts.as_of(cut + 100 * DAY)["n_total"]
    assert total.sum() == len(tiny_dataset.engagements.before(cut))


def test_an_encoder_goes_through_the_whole_evaluation(encoder: Encoder, tiny_dataset: Dataset) -> None:
    model = EncoderModel(encoder, tiny_dataset, "live", tiny_dataset.meta.cut_test)
    report = evaluate_retrieval(tiny_dataset, model, "live", [Random()])
    assert report.model is not None
    assert 0 <= report.model.quality.metrics["recall@10"].value <= 1
    assert report.model.quality.metrics["recall@2000"].value == 1
