"""Where training begins: an untrained encoder is latent semantic retrieval, and history entries have the room that there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval.data.schema import Dataset, Engagement
from retrieval.learn import warm
from retrieval.learn.batches import BatchSettings
from retrieval.learn.prepare import MOST_ENTRY, fit_entries
from retrieval.learn.settings import plan_of
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.timeline import Timeline
from retrieval.learn.train import Trainer
from retrieval.learn.warm import documents_of, newness_of, word_vectors
from retrieval.llama import Size
from retrieval.writer import Budgets

PLAN = EncoderPlan(
    size=Size(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
)


@pytest.fixture(scope="module")
def begun(tiny_dataset: Dataset) -> Trainer:
    """A trainer at step 0 whose words are as loud as they are rare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "MOSTLY_NEW", 0.0)
        return start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 1)


def test_the_final_norm_lets_words_through_as_loud_as_they_are_rare(begun: Trainer, tiny_dataset: Dataset) -> None:
    before, tokens = tiny_dataset.meta.cut_test, begun.sampler.writer.tokens
    vectors, idf = word_vectors(list(documents_of(tiny_dataset, tokens, before, PLAN.seed)), len(tokens), 31, PLAN.seed)
    seen = np.flatnonzero(np.abs(vectors).sum(1) > 0)
    expected = idf[seen] ** newness_of(tiny_dataset, before)
    table = begun.model.get_input_embeddings().weight
    with torch.no_grad():
        heard = begun.model.norm(table[torch.from_numpy(seen)]).numpy()
    loud = np.linalg.norm(heard, axis=1)
    assert not heard[:, -1].any() and np.ptp(np.linalg.norm(table.detach().numpy()[seen], axis=1)) < 1e-3
    below = expected < np.quantile(expected, 0.95)
    ratio = loud[below] / expected[below]
    assert np.ptp(ratio) < 1e-3 * ratio.mean()
    np.testing.assert_allclose(heard[:, :-1] / loud[:, None], vectors[seen], atol=1e-4)


def test_rarity_decides_where_most_meetings_are_new(tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    for least in (0.0, 1.1):
        monkeypatch.setattr(warm, "MOSTLY_NEW", least)
        norms.append(start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 1).model.norm.weight.detach())
    assert norms[0][-1] == 0 and bool((norms[1] == 1).all())


def test_newness_is_the_share_of_first_meetings(tiny_dataset: Dataset) -> None:
    before = tiny_dataset.meta.cut_test
    item = Timeline.of(tiny_dataset, before).item.tolist()
    assert newness_of(tiny_dataset, before) == len(set(item)) / len(item)
    assert newness_of(tiny_dataset, 0) == 0


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
