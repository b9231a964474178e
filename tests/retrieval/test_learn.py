"""What training reads: the loss against hand sums, batches against their promises, rows against what serving writes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval import records
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import encode
from retrieval.learn.batches import BatchSettings
from retrieval.learn.loop import schedule
from retrieval.learn.loss import info_nce
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.timeline import Timeline, day_runs
from retrieval.llama import Size, pad_rows
from retrieval.records import ItemWords, records_of, view_of

PLAN = EncoderPlan(
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
)


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
        assert np.isfinite(batch.log_q).all()
        lengths = np.array([len(row) for row in batch.member_rows])
        assert (batch.prefix <= lengths[batch.owner]).all() and (batch.prefix > 0).all()
        assert lengths.max() <= PLAN.budgets.member


def test_a_prefix_of_a_row_is_the_shorter_row(tiny_dataset: Dataset) -> None:
    """One causal pass serves all targets of a member: what is pooled of a prefix is what the prefix alone gives."""
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 10)
    batch = trainer.sampler.batch(0)
    with torch.no_grad():
        together = trainer._member_states(batch)
        alone = [
            encode(trainer.model, *pad_rows([batch.member_rows[row][:prefix]], 0), trainer.settings.pooling)[0]
            for row, prefix in zip(batch.owner.tolist(), batch.prefix.tolist())
        ]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def with_repeats(dataset: Dataset, times: int) -> Dataset:
    """Every engagement again some hours and days later, up to `times` more."""
    rng = np.random.default_rng(0)
    copies = rng.integers(0, times + 1, len(dataset.engagements))
    again = dataset.engagements.take(np.repeat(np.arange(len(copies)), copies))
    later = replace(again, timestamp=again.timestamp + rng.integers(1, 6 * DAY, len(again)))
    columns = {
        name: np.concatenate([column, getattr(later, name)])
        for name, column in vars(dataset.events).items()
        if isinstance(column, np.ndarray)
    }
    events = replace(dataset.events, **columns)
    return replace(dataset, events=events.take(np.argsort(events.timestamp, kind="stable")))


@pytest.mark.parametrize(("newest", "member_budget"), [(1_024, 224), (9, 224), (9, 80)])
def test_a_training_row_is_the_row_that_serving_writes(
    tiny_dataset: Dataset, newest: int, member_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last target of a row sees what the night writes from the member's record at that moment: repeats, caps and all."""
    monkeypatch.setattr(records, "NEWEST", newest)
    dataset = with_repeats(tiny_dataset, 3)
    plan = replace(PLAN, budgets=replace(PLAN.budgets, member=member_budget))
    sampler, words = start(dataset, dataset.meta.cut_test, plan, 10).sampler, ItemWords(dataset.items)
    timeline, capped = sampler.timeline, 0
    for target in np.random.default_rng(1).choice(np.flatnonzero(timeline.earlier > 2), 25, replace=False).tolist():
        rows, owner, prefix, kept = sampler._member_side([np.array([target])])
        member, moment = int(timeline.member[target]), int(timeline.timestamp[target])
        record = list(records_of(dataset, moment))[member]
        assert len(record.history) > len(set(record.seen)) or timeline.earlier[target] < 6, "repeats are the point"
        served = sampler.writer.members([view_of(record, words)])[0]
        assert kept.tolist() == [target] and rows[owner[0]][: prefix[0]] == served
        first_ever = list(dict.fromkeys(record.seen))
        capped += first_ever != [dataset.items.item_id[row] for row in timeline.history(member, moment)[0].tolist()]
    assert (capped > 5) == (newest == 9), "a window of 9 must show other entries than the whole history"


def test_an_earlier_target_of_a_row_sees_only_what_came_before_it(tiny_dataset: Dataset) -> None:
    dataset = with_repeats(tiny_dataset, 2)
    sampler = start(dataset, dataset.meta.cut_test, PLAN, 10).sampler
    timeline = sampler.timeline
    for member in range(0, 40, 5):
        mine = np.arange(timeline.start[member], timeline.start[member + 1])
        rows, _, prefix, kept = sampler._member_side([mine])
        opening = len(sampler._opening(member, int(timeline.timestamp[mine[0]])))
        items, times = timeline.history(member, int(timeline.timestamp[mine[-1]]))
        lengths = [len(sampler._entries[item]) for item in items.tolist()]
        unseen = len(items) - next(n for n in range(len(items) + 1) if sum(lengths[len(items) - n :]) == len(rows[0]) - opening)
        for position, end in zip(kept.tolist(), prefix.tolist()):
            shown = times[unseen:] < timeline.timestamp[position]
            assert end == opening + sum(np.array(lengths[unseen:])[shown].tolist())


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[-1] < 0.02
    assert rates.index(1.0) <= 10 and all(np.diff(rates[11:]) < 0)
