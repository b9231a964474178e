"""Hard negatives, whole histories and which days and members teach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.data.schema import DAY, IMPRESSION, Dataset
from retrieval.encoder import Encoder
from retrieval.evidence.protocol import last_after_cut
from retrieval.learn.batches import BatchSettings
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.fit import train_encoder
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.train import Trainer
from retrieval.learn.whole import whole_views
from retrieval.llama import Size
from retrieval.prompts import DID

PLAN = EncoderPlan(
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
)
MINED = replace(PLAN, batch=replace(PLAN.batch, hard=2, hard_from="mined", mine_every=3, mine_skip=2, mine_window=6))


def begun(dataset: Dataset, plan: EncoderPlan, steps: int = 8) -> Trainer:
    return start(dataset, dataset.meta.cut_test, plan, steps)


def test_passed_over_items_of_the_targets_request_compete_with_it_alone(tiny_dataset: Dataset) -> None:
    plan = replace(PLAN, batch=replace(PLAN.batch, hard=2))
    sampler, plain = begun(tiny_dataset, plan).sampler, begun(tiny_dataset, PLAN).sampler
    events, timeline, found = tiny_dataset.events, sampler.timeline, 0
    for step in range(4):
        batch, without = sampler.batch(step), plain.batch(step)
        drawn = len(without.columns)
        assert batch.item_rows[:drawn] == without.item_rows and (batch.log_q[drawn:] == 0).all()
        for row, target in enumerate(batch.target.tolist()):
            member, moment = timeline.member[target], timeline.timestamp[target]
            mine = (events.member == member) & (events.timestamp < tiny_dataset.meta.cut_test)
            own = events.request[mine & (events.timestamp == moment) & tiny_dataset.is_engagement][0]
            shown = set(events.item[mine & (events.request == own) & (events.action == 0)].tolist())
            shown -= set(timeline.item[timeline.start[member] : timeline.start[member + 1]].tolist())
            hard = batch.columns[drawn:][~batch.hidden[row, drawn:]].tolist()
            assert set(hard) <= shown and len(hard) == min(2, len(shown))
            drawn_copy = np.isin(batch.columns[:drawn], hard)
            assert batch.hidden[row, :drawn][drawn_copy].all(), "a hard item counts once"
            np.testing.assert_array_equal(batch.hidden[row, :drawn][~drawn_copy], without.hidden[row][~drawn_copy])
            found += len(hard)
    assert found > 20


def test_without_impressions_the_log_has_no_hard_negatives(tiny_dataset: Dataset) -> None:
    likes = replace(tiny_dataset, events=tiny_dataset.engagements)
    with pytest.raises(TrainingError, match="no impression with a request"):
        begun(likes, replace(PLAN, batch=replace(PLAN.batch, hard=1)))


def test_mined_items_are_the_models_best_that_were_there_and_not_engaged(tiny_dataset: Dataset) -> None:
    trainer = begun(tiny_dataset, MINED)
    batch, miner, sampler = trainer.sampler.batch(0), trainer.miner, trainer.sampler
    assert miner is not None
    with torch.no_grad():
        states = trainer._member_states(batch)
    assert (miner.choose(batch, states, 0) == -1).all(), "nothing is mined before the first refresh"
    miner.refresh(trainer.model, "mean")
    chosen, timeline = miner.choose(batch, states, 0), sampler.timeline
    scores = (states @ miner.table.T).numpy()
    for row, target in enumerate(batch.target.tolist()):
        member = timeline.member[target]
        there = sampler.there(batch.day)
        there[timeline.item[timeline.start[member] : timeline.start[member + 1]]] = False
        ranked = [item for item in np.argsort(-scores[row]).tolist() if there[item]]
        assert len(set(chosen[row].tolist())) == 2 and set(chosen[row].tolist()) <= set(ranked[2:8])
    heavy = replace(MINED, batch=replace(MINED.batch, hard_weight=20.0))
    found = begun(tiny_dataset, heavy).sampler.with_hard(batch, chosen)
    np.testing.assert_allclose(found.log_q[len(batch.columns) :], -np.log(20.0), rtol=1e-6)
    wider = sampler.with_hard(batch, chosen)
    assert len(wider.item_rows) > len(batch.item_rows) and len(wider.columns) == wider.hidden.shape[1]


def test_a_killed_run_with_mining_goes_on_to_the_same_weights(tiny_dataset: Dataset, tmp_path: Path) -> None:
    whole, killed, resumed = (begun(tiny_dataset, MINED) for _ in range(3))
    whole.run(8)
    killed.run(5)
    killed.save(tmp_path)
    assert resumed.resume(tmp_path)
    resumed.run(8)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters()):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_whole_history_in_training_is_what_the_evaluation_shows(tiny_dataset: Dataset) -> None:
    plan = replace(PLAN, history="full", budgets=replace(PLAN.budgets, member=400))
    sampler = begun(tiny_dataset, plan).sampler
    queries = last_after_cut(tiny_dataset, "valid")
    views, writer, others = whole_views(tiny_dataset, queries), sampler.writer, 0
    did = writer.tokens.id(DID)
    for row, view in enumerate(views):
        moment, member = int(queries.timestamp[row]), int(queries.member[row])
        mine = np.flatnonzero((sampler.timeline.member == member) & (sampler.timeline.timestamp == moment))
        rows, _, prefix, kept = sampler._member_side([mine[:1]])
        assert kept.tolist() == mine[:1].tolist() and rows[0][: prefix[0]] == writer.members([view])[0]
        passed = [entry for entry in view.history if entry.action == IMPRESSION]
        assert all(entry.label != 1 and entry.timestamp < moment // DAY * DAY for entry in passed), "no visit is foretold"
        assert rows[0].count(did) <= len(view.history)
        others += len(passed)
    assert others > len(views)
    positives = begun(tiny_dataset, PLAN).sampler
    assert not any(positives.writer.tokens.id(DID) in row for row in positives.batch(0).member_rows)


def test_an_encoder_of_whole_histories_trains_and_says_so(tiny_dataset: Dataset, tmp_path: Path) -> None:
    plan = replace(PLAN, steps=2, minutes=None, history="full", quantizer="none")
    report = train_encoder(tiny_dataset, tmp_path / "out", plan)
    encoder = Encoder.load(tmp_path / "out", whole_log=True)
    assert report.validation and encoder.facts["history"] == "full" and encoder.writer.quantizer.names == ()


def test_older_days_teach_less_and_a_share_of_members_teaches(tiny_dataset: Dataset) -> None:
    old, new = (begun(tiny_dataset, replace(PLAN, batch=replace(PLAN.batch, recency_days=days))).sampler for days in (None, 3.0))
    days = np.array([np.median(new.timeline.day[run]) for run in new.runs])
    ratio = new._share / old._share
    np.testing.assert_allclose(ratio / ratio[-1], 0.5 ** ((days[-1] - days) / 3.0), rtol=1e-9)
    few = begun(tiny_dataset, replace(PLAN, batch=replace(PLAN.batch, share=0.4))).sampler
    teachers = set(few.timeline.member[np.concatenate(few.runs)].tolist())
    assert 8 <= len(teachers) <= 24 and len(few.timeline) == len(old.timeline)
    assert set(few.timeline.member[few.batch(0).target].tolist()) <= teachers
