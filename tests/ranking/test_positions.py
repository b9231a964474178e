"""Clicks fall with position: what a place adds is learned beside the ranker, and items' own worth comes out nearer the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ranking.calibrate import fit, sigmoid
from ranking.cli.train_report import places as told
from ranking.learn.examples import pools_of, sampled
from ranking.learn.loop import LoopSettings, Trainer
from ranking.learn.positions import PositionSettings, at_mean_place, known_shifts, places_of
from ranking.learn.settings import with_settings
from ranking.learn.start import Origins, RankerPlan, start
from ranking.learn.train import _identity, train_ranker
from ranking.learn.validate import VALIDATION_CANDIDATES, judge
from ranking.prompts import RankBudgets
from ranking.ranker import Ranker
from ranking.tasks import tasks_of
from retrieval.data.schema import Dataset
from retrieval.llama import Size

PLAN = RankerPlan(
    steps=200,
    minutes=None,
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=300),
    budgets=RankBudgets(item=32, prefix=64),
    loop=LoopSettings(learning_rate=5e-3, candidates=96),
)
EFFECT, FALL = 1.0, 0.9
"""What the attribute adds to the log-odds of a click, and what each of the four positions takes."""


@pytest.fixture(scope="module")
def shop(tiny_dataset: Dataset) -> Dataset:
    """The tiny shop's impressions alone, ten members asking as four do, so that there are enough of them."""
    log = tiny_dataset.events
    return replace(tiny_dataset, events=log.take(log.action == 0))


def clicked(shop: Dataset, on_top: bool) -> Dataset:
    """Even items are better by EFFECT; `on_top`: odd ones stand higher, so that raw clicks hide it."""
    rng, log = np.random.default_rng(3), shop.events
    even = log.item % 2 == 0
    position = log.position
    if on_top:
        key = np.lexsort((even + 1.5 * rng.random(len(log)), log.request))
        position = np.empty_like(log.position)
        position[key] = np.arange(len(log)) - np.searchsorted(log.request[key], log.request[key])
    logit = EFFECT * even - FALL * position + 1.0
    label = (rng.random(len(log)) < sigmoid(logit)).astype(np.int8)
    return replace(shop, events=replace(log, position=position.astype(np.int16), label=label))


def learned(dataset: Dataset, on: bool) -> tuple[float, Trainer]:
    """The attribute's effect on served scores after a training."""
    trainer = start(dataset, dataset.meta.cut_test, replace(PLAN, positions=PositionSettings(on=on)), 200)
    trainer.run(200)
    pool = trainer.pools["label"]
    scores, _ = judge(trainer, trainer.writer, {"label": pool})["label"]
    even = np.concatenate([pool.item[pool.candidates(group)] % 2 == 0 for _, group in sampled(pool, VALIDATION_CANDIDATES)])
    return float(scores[even].mean() - scores[~even].mean()), trainer


@pytest.mark.parametrize(("on_top", "margin"), [(False, 0.0), (True, 0.3)])
def test_an_items_worth_is_closer_to_the_truth_when_places_are_taken_out(shop: Dataset, on_top: bool, margin: float) -> None:
    dataset = clicked(shop, on_top)
    raw, plain = learned(dataset, on=False)
    corrected, trainer = learned(dataset, on=True)
    assert abs(corrected - EFFECT) < abs(raw - EFFECT) - margin
    assert plain.positions is None and trainer.positions is not None
    curve = trainer.positions.curve()
    assert [(row["first"], row["last"]) for row in curve] == [(0, 0), (1, 2), (3, 6)]
    logit, shown = (np.array([row[name] for row in curve], float) for name in ("logit", "shown"))
    assert abs((logit * shown).sum() / shown.sum()) < 1e-4, "the served score is that of the mean shown place"
    assert np.abs(logit - FALL * np.array([1.5, 0.0, -1.5])).max() < 0.7


def test_what_is_fitted_later_is_fitted_on_the_mean_place() -> None:
    rng, size = np.random.default_rng(0), 40_000
    worth = rng.normal(size=size)
    shift = np.where(worth + rng.normal(size=size) > 0, 0.8, -0.8)  # the better stand higher
    label = (rng.random(size) < sigmoid(worth + shift - 1)).astype(np.int8)
    score = (2 * worth).astype(np.float32)  # twice as sure as it should be
    raw, expected = fit(score, label), fit(score, at_mean_place(score, label, shift))
    assert raw.a > 0.6 and abs(expected.a - 0.5) < 0.03 and abs(expected.b + 1) < 0.06
    steps = fit(score, at_mean_place(score, label, shift), "isotonic").probabilities(np.array([0.0, 2.0], np.float32))
    assert np.abs(steps - sigmoid(np.array([-1.0, 0.0]))).max() < 0.04
    few = np.zeros(30, np.int8)
    assert at_mean_place(score[:30], few, shift[:30]) is few, "too few answers to weigh a place on"


def test_without_positions_nothing_is_different(shop: Dataset) -> None:
    log = shop.events
    bare = replace(shop, events=replace(log, position=np.full_like(log.position, -1)))
    cut, small = shop.meta.cut_test, replace(PLAN, size=replace(PLAN.size, hidden=16, mlp=32))
    one, other = (start(bare, cut, replace(small, positions=PositionSettings(on=on)), 2) for on in (True, False))
    for trainer in (one, other):
        assert trainer.positions is None
        trainer.run(2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one.model.parameters(), other.model.parameters()))
    identities = [_identity(bare, replace(small, positions=PositionSettings(on=on)), Origins()) for on in (True, False)]
    assert identities[0] == identities[1] and "positions" not in identities[0]["plan"]  # type: ignore[operator]
    engaged = replace(tasks_of(shop)["label"], name="engage")
    pools = pools_of(bare, tasks_of(bare), None, cut, small.groups, 0)
    assert places_of(shop, pools, {"label": engaged}, PositionSettings()) is None, "a drawn item stood nowhere"


def test_a_training_says_what_it_took_out_and_goes_on_after_a_kill(shop: Dataset, tmp_path: Path) -> None:
    dataset, plan = clicked(shop, False), replace(PLAN, steps=6)
    report = train_ranker(dataset, tmp_path / "ranker", plan)
    facts = Ranker.load(tmp_path / "ranker").facts.training
    assert facts["positions"]["curve"] == report.positions and len(report.positions) == 3
    assert "positions" not in facts["settings"] and list(told(report.positions)) == ["feed"]
    event = np.array([-1, *np.flatnonzero(dataset.events.position == 0)[:2]])
    first = report.positions[0]["logit"]
    np.testing.assert_allclose(known_shifts(dataset, facts, tasks_of(dataset)["label"], event), [0, first, first])
    off = train_ranker(dataset, tmp_path / "off", with_settings(plan, ["positions.on=false"]))
    assert off.positions == [] and "positions" not in Ranker.load(tmp_path / "off").facts.training
    whole, halfway, resumed = (start(dataset, dataset.meta.cut_test, plan, 4) for _ in range(3))
    whole.run(4)
    halfway.run(2)
    halfway.save(tmp_path / "checkpoint")
    assert resumed.resume(tmp_path / "checkpoint")
    resumed.run(4)
    assert whole.positions is not None and resumed.positions is not None
    assert whole.positions.state() == resumed.positions.state() and any(row["logit"] for row in whole.positions.curve())
    again = resumed.again(9, 1e-3)
    assert again.positions is not None
    assert again.positions.curve() == resumed.positions.curve()
