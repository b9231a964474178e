"""Where training begins: an untrained encoder is latent semantic retrieval, and history entries have the room that there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval.data.schema import Dataset, Engagement
from retrieval.encoder import encode
from retrieval.learn.batches import BatchSettings
from retrieval.learn.prepare import MOST_ENTRY, fit_entries
from retrieval.learn.settings import plan_of
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.timeline import Timeline
from retrieval.learn.train import Trainer
from retrieval.learn.warm import word_vectors
from retrieval.llama import Size, pad_rows
from retrieval.writer import Budgets

PLAN = EncoderPlan(
    size=Size(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
)


@pytest.fixture(scope="module")
def begun(tiny_dataset: Dataset) -> Trainer:
    """A trainer at step 0."""
    return start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 1)


def rows_of(begun: Trainer, dataset: Dataset) -> list[list[int]]:
    """Some items as the encoder reads them."""
    return begun.sampler.writer.items([dataset.items[row] for row in range(12)], {})


def test_an_untrained_encoder_sums_its_word_vectors(begun: Trainer, tiny_dataset: Dataset) -> None:
    rows = rows_of(begun, tiny_dataset)
    table = begun.model.get_input_embeddings().weight.detach().numpy()[:, :-1]
    sums = np.stack([table[row].sum(0) for row in rows])
    expected = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    with torch.no_grad():
        found = encode(begun.model, *pad_rows(rows, begun.sampler.writer.tokens.pad)).numpy()
    np.testing.assert_allclose(found[:, :-1], expected, atol=1e-5)
    assert not found[:, -1].any()


def test_every_embedding_has_one_length_and_rare_words_the_loudest_part(begun: Trainer) -> None:
    table = begun.model.get_input_embeddings().weight.detach().numpy()
    assert np.ptp(np.linalg.norm(table, axis=1)) < 1e-3
    loud = np.linalg.norm(table[:, :-1], axis=1)
    assert loud.max() > 1.5 * loud.min() > 0


def test_training_moves_what_began_as_nothing(tiny_dataset: Dataset) -> None:
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 3)
    layers = {name: part for name, part in trainer.model.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert len(layers) == 4 and not any(part.any() for part in layers.values())
    trainer.run(3)
    assert all(part.any() for part in layers.values())


def test_word_vectors_bring_words_of_the_same_documents_together() -> None:
    documents = [[0, 1, 4], [0, 1], [1, 0, 4], [2, 3, 4], [3, 2], [2, 3, 4]] * 5
    vectors, idf = word_vectors(documents, 6, 2, seed=0)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.9 and cosines[2, 3] > 0.9 and cosines[0, 2] < 0.2
    assert not vectors[5].any() and idf[4] < idf[0]


def test_too_few_documents_leave_the_model_as_it_was(tiny_dataset: Dataset) -> None:
    early = int(tiny_dataset.engagements.timestamp[:1].max()) + 1
    trainer = start(tiny_dataset, early, replace(PLAN, warm_words=True), 1)
    cold = start(tiny_dataset, early, replace(PLAN, warm_words=False), 1)
    ours, theirs = trainer.model.get_input_embeddings().weight, cold.model.get_input_embeddings().weight
    assert torch.equal(ours, theirs)


def test_entries_get_the_room_that_histories_leave(tiny_dataset: Dataset) -> None:
    before = tiny_dataset.meta.cut_test
    earlier = Timeline.of(tiny_dataset, before).earlier
    median = int(np.median(earlier[earlier > 0]))
    wide = Budgets(member=64 + median * 20, entry=16)
    assert fit_entries(tiny_dataset, before, wide) == replace(wide, entry=20, whole_entries=True)
    assert fit_entries(tiny_dataset, before, replace(wide, member=64 + median * 90)).entry == MOST_ENTRY
    tight = Budgets(member=64 + median * 10, entry=16)
    assert fit_entries(tiny_dataset, before, tight) == tight


def test_whole_entries_show_creator_and_text_up_to_the_budget(begun: Trainer, tiny_dataset: Dataset) -> None:
    writer, item = begun.sampler.writer, tiny_dataset.items[3]
    done = [Engagement(item, 0, "like")]
    short = replace(writer, budgets=Budgets(entry=200)).entries(done)[0]
    whole = replace(writer, budgets=Budgets(entry=200, whole_entries=True)).entries(done)[0]
    assert whole[: len(short)] == short and len(whole) > len(short)
    assert replace(writer, budgets=Budgets(entry=9, whole_entries=True)).entries(done)[0] == whole[:9]


def test_who_names_the_length_of_an_entry_gets_it() -> None:
    assert plan_of({}).fit_entries
    named = plan_of({"entry_tokens": 24})
    assert not named.fit_entries and named.budgets == Budgets(entry=24)
