"""Training: the loss against hand sums, batches against their promises, and runs that can be repeated and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.data.schema import MISSING_TIME, Dataset, Events, Items, Members, Meta
from retrieval.encoder import Encoder, encode
from retrieval.evidence.protocol import last_after_cut
from retrieval.learn.batches import BatchSettings
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.fit import EncoderPlan, recall_at_100, start, train_encoder
from retrieval.learn.loss import info_nce
from retrieval.learn.sessions import NOTE, with_sessions
from retrieval.learn.timeline import Timeline, day_runs
from retrieval.learn.train import LoopSettings, Trainer, schedule
from retrieval.llama import Size, new_llama, pad_rows

PLAN = EncoderPlan(
    steps=30,
    minutes=None,
    seed=3,
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
    loop=LoopSettings(learning_rate=5e-3),
)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def test_info_nce_equals_the_sum_written_out() -> None:
    torch.manual_seed(0)
    states = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    items = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    positive, log_q = torch.tensor([1, 3]), torch.log(torch.tensor([0.9, 0.5, 0.1, 0.7]))
    hidden = torch.tensor([[False, False, True, False], [False, False, False, False]])
    scores = 5.0 * states @ items.T
    expected = 0.0
    for target, own in enumerate(positive.tolist()):
        total = sum(
            float(torch.exp(scores[target, column] - (0 if column == own else log_q[column])))
            for column in range(4)
            if not hidden[target, column]
        )
        expected += -(float(scores[target, own]) - np.log(total)) / 2
    found = info_nce(states, items, positive, log_q, hidden, torch.tensor(5.0))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_timeline_keeps_first_engagements_and_counts_strictly_earlier_ones(tiny_dataset: Dataset) -> None:
    timeline = Timeline.of(tiny_dataset, tiny_dataset.meta.cut_test)
    assert len(set(zip(timeline.member.tolist(), timeline.item.tolist()))) == len(timeline)
    assert timeline.timestamp.max() < tiny_dataset.meta.cut_test
    for row in range(0, len(timeline), 11):
        mine = slice(timeline.start[timeline.member[row]], timeline.start[timeline.member[row] + 1])
        assert timeline.earlier[row] == (timeline.timestamp[mine] < timeline.timestamp[row]).sum()


def test_day_runs_hold_every_entry_once_and_thin_days_share() -> None:
    day = np.array([5, 5, 5, 6, 7, 7, 7, 7, 9])
    runs = day_runs(day, 3)
    assert sorted(np.concatenate(runs).tolist()) == list(range(9))
    assert [sorted(set(day[run].tolist())) for run in runs] == [[5], [6, 7, 9]]


def test_a_batch_keeps_its_promises(tiny_dataset: Dataset) -> None:
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 10)
    sampler = trainer.sampler
    for step in range(5):
        batch = sampler.batch(step)
        again = sampler.batch(step)
        assert batch.member_rows == again.member_rows and batch.item_rows == again.item_rows
        rows = np.arange(len(batch.owner))
        assert not batch.hidden[rows, batch.positive].any(), "a target must compete"
        assert (batch.log_q <= 0).all() and np.isfinite(batch.log_q).all()
        lengths = np.array([len(row) for row in batch.member_rows])
        assert (batch.prefix <= lengths[batch.owner]).all() and (batch.prefix > 0).all()
        assert lengths.max() <= PLAN.budgets.member


def test_a_prefix_of_a_row_is_the_shorter_row(tiny_dataset: Dataset) -> None:
    """One causal pass serves all targets of a member: the mean over a prefix equals encoding the prefix alone."""
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 10)
    batch = trainer.sampler.batch(0)
    with torch.no_grad():
        together = trainer._member_states(batch)
        alone = [
            encode(trainer.model, *pad_rows([batch.member_rows[row][:prefix]], 0))[0]
            for row, prefix in zip(batch.owner.tolist(), batch.prefix.tolist())
        ]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_a_training_row_is_the_row_that_serving_writes(tiny_dataset: Dataset) -> None:
    """The last target of a member row sees exactly what `Writer.members` writes for the history before it."""
    from retrieval.data.schema import MemberView
    from retrieval.evidence.protocol import engagements

    sampler = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 10).sampler
    timeline, log = sampler.timeline, tiny_dataset.engagements
    target = int(np.flatnonzero(timeline.earlier > 2)[0])
    rows, owner, prefix, kept = sampler._member_side([np.array([target])])
    member, moment = int(timeline.member[target]), int(timeline.timestamp[target])
    past = np.flatnonzero((log.member == member) & (log.timestamp < moment))
    history = engagements(tiny_dataset, log, past, {})
    view = MemberView(tiny_dataset.members[member], history, tiny_dataset.connections_of(member, moment))
    assert kept.tolist() == [target] and rows[owner[0]][: prefix[0]] == sampler.writer.members([view])[0]


def test_training_learns_the_tiny_shop_from_random_words(tiny_dataset: Dataset) -> None:
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_valid, replace(PLAN, warm_words=False), 30)
    before = recall_at_k(trainer, tiny_dataset, 10)
    trainer.run(30)
    assert np.mean([point["loss"] for point in trainer.curve[-5:]]) < trainer.curve[0]["loss"] - 0.3
    assert recall_at_k(trainer, tiny_dataset, 10) > before + 0.2
    queries = last_after_cut(tiny_dataset, "valid")
    assert recall_at_100(trainer, tiny_dataset, queries) == 1.0, "60 items: the top 100 hold every candidate"


def test_warm_words_know_the_topics_before_any_training(tiny_dataset: Dataset) -> None:
    warm = start(tiny_dataset, tiny_dataset.meta.cut_valid, PLAN, 30)
    cold = start(tiny_dataset, tiny_dataset.meta.cut_valid, replace(PLAN, warm_words=False), 30)
    assert recall_at_k(warm, tiny_dataset, 10) > recall_at_k(cold, tiny_dataset, 10) + 0.2


def test_a_killed_run_goes_on_to_the_same_weights_and_another_plan_is_refused(tiny_dataset: Dataset, tmp_path: Path) -> None:
    cut = tiny_dataset.meta.cut_valid
    whole = start(tiny_dataset, cut, PLAN, 16)
    whole.run(16)
    killed = start(tiny_dataset, cut, PLAN, 16)
    killed.run(7)
    killed.save(tmp_path)
    resumed = start(tiny_dataset, cut, PLAN, 16)
    assert resumed.resume(tmp_path)
    resumed.run(16)
    torch.testing.assert_close(weights(whole), weights(resumed), atol=1e-6, rtol=1e-5)
    with pytest.raises(TrainingError, match="another plan"):
        start(tiny_dataset, cut, PLAN, 17).resume(tmp_path)


def recall_at_k(trainer: Trainer, dataset: Dataset, k: int) -> float:
    """Share of validation targets among the best k, without excluding the history: a rough gauge for the tiny shop."""
    from retrieval.counts import Counts
    from retrieval.evidence.protocol import member_views

    queries = last_after_cut(dataset, "valid")
    encoder = Encoder(trainer.model, trainer.sampler.writer, "", {})
    items = [dataset.items[row] for row in range(len(dataset.items))]
    vectors = encoder.items(items, Counts.from_dataset(dataset).as_of(dataset.meta.cut_valid))
    scores = encoder.members(member_views(dataset, queries)) @ vectors.T
    for row in range(len(queries)):
        scores[row, queries.excluded[row]] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :k]
    trainer.model.train()
    return float(np.mean([np.isin(queries.targets[row], best[row]).mean() for row in range(len(queries))]))


def test_train_encoder_leaves_a_complete_folder_and_refuses_to_write_over_it(tiny_dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    report = train_encoder(tiny_dataset, out, replace(PLAN, steps=3))
    assert report.steps == 3 and Encoder.load(out).fingerprint == report.fingerprint
    with pytest.raises(TrainingError, match="already holds an encoder"):
        train_encoder(tiny_dataset, out, PLAN)
    again = train_encoder(tiny_dataset, tmp_path / "again", replace(PLAN, steps=3))
    assert again.fingerprint == report.fingerprint


def test_from_a_base_checkpoint_with_lora(tiny_dataset: Dataset, tiny_tokens, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    base = tmp_path / "base"
    new_llama(PLAN.size, len(tiny_tokens), causal_lm=True).save_pretrained(base)
    tiny_tokens.save(base)
    report = train_encoder(tiny_dataset, tmp_path / "out", replace(PLAN, steps=2, base=str(base), lora_rank=2))
    encoder = Encoder.load(tmp_path / "out")
    assert report.fingerprint == encoder.fingerprint
    assert encoder.model.get_input_embeddings().num_embeddings >= len(encoder.writer.tokens)


def test_a_catalogue_without_interactions_trains_on_its_text_and_says_so(tiny_dataset: Dataset, tmp_path: Path) -> None:
    catalogue = replace(tiny_dataset, events=no_events(), connections=None, members=Members([]), meta=Meta("shop", 0, 0, ()))
    made_up, note = with_sessions(catalogue, seed=0)
    assert note == NOTE and len(made_up.engagements) > 0
    topic = np.array([row % 4 for row in range(len(catalogue.items))])
    same = [len(set(topic[made_up.events.item[made_up.events.member == member]])) == 1 for member in range(20)]
    assert np.mean(same) > 0.5, "look-alike sessions mostly stay within a topic"
    report = train_encoder(catalogue, tmp_path / "encoder", replace(PLAN, steps=2))
    encoder = Encoder.load(tmp_path / "encoder")
    assert report.note == NOTE and not {"n_total", "n_7d"} & set(encoder.writer.quantizer.names)


def no_events() -> Events:
    empty = np.zeros(0, np.int64)
    return Events(*[empty.astype(kind) for kind in ("i8", "i4", "i4", "i8", "i2", "i1", "f4", "i1", "i4", "i2", "i2")])


def test_a_catalogue_without_words_is_refused(tiny_dataset: Dataset, tmp_path: Path) -> None:
    from retrieval.learn.prepare import NothingToLearn

    n = len(tiny_dataset.items)
    mute = Items(tiny_dataset.items.item_id, [""] * n, [""] * n, [""] * n, [""] * n, np.full(n, MISSING_TIME))
    with pytest.raises(NothingToLearn, match="no item has a title or a text"):
        train_encoder(replace(tiny_dataset, items=mute), tmp_path / "encoder", PLAN)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[-1] < 0.02
    assert rates.index(1.0) <= 10 and all(np.diff(rates[11:]) < 0)
