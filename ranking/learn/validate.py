"""What the validation window decides before the refit: the learning rate, the length and the calibrators."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ranking.calibrate import Calibrator, Method, auc, calibration_error, fit
from ranking.learn.batches import GroupWriter
from ranking.learn.examples import Pool, pools_of, sampled, teaches
from ranking.learn.fuse import NO_HEAD_NOTE, blend_facts
from ranking.learn.loop import Trainer
from ranking.learn.positions import Answers, Positions, at_mean_place
from ranking.learn.start import Held, Origins, RankerPlan, start
from ranking.prefill.engine import Engine
from ranking.tasks import LABEL, taught_of
from retrieval.data.schema import Dataset
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.choose import Progress, Trials, try_rates
from retrieval.learn.loop import SPEED_STEPS, seconds_per_step

VALIDATION_SHARE = 0.3
"""Share of all steps that goes to the validation run and its trials; the refit gets the rest."""
TRIAL_SHARE = 0.2
"""Share of the validation steps that goes to the trials together: a quarter of what is left to the run itself."""
TRIAL_LEAST = 100
"""Steps below which a trial would tell nothing about a rate: then the default is taken untried."""
RATES = (0.5, 1.0, 2.0)
"""Learning rates that are tried, as multiples of the default."""
VALIDATION_CANDIDATES, TRIAL_CANDIDATES = 4_000, 2_000
"""Candidates that the validation run is judged and calibrated on, and a trial is judged on, at most; a quarter of it for each
further task."""
LOOKS = (0.6, 1.0)
"""Shares of the validation run at which it is judged."""
WORTH = 0.002
"""AUC by which an earlier look must be better to shorten the refit: less is noise."""
RATE_WORTH = 0.02
"""AUC by which another learning rate must beat the default: on TRIAL_CANDIDATES less is noise."""
JUDGED = (len(LOOKS) * VALIDATION_CANDIDATES + len(RATES) * TRIAL_CANDIDATES) / 3
"""Candidates to train on that cost as much as all judging: a pass without gradient takes about a third of a step."""
HELD_LEAST = 60
"""Answers of either kind among the members held back below which the refit keeps the validation run's calibrators."""
GROUPS_PER_PASS = 64
UNCALIBRATED_NOTE = "too few answers between the cuts: probabilities are not calibrated"
WITHOUT_ENCODER_NOTE = (
    "the encoder knows the validation window and holds no twin that does not: the validation run did without it"
)

Judged = dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]]
"""Task -> raw scores [n] and answers [n] of the validation window."""
Expected = dict[str, tuple[npt.NDArray[np.float32], Answers]]
"""The same with the answers expected at the mean place, which everything is fitted on."""


def decide(dataset: Dataset, plan: RankerPlan, origins: Origins, report: Progress) -> dict[str, Any]:
    """Steps and learning rate of the refit, calibrators, and what the validation run reached.

    The speed of a few steps turns minutes into steps; from there on everything follows from the data, the plan and the
    number of steps.
    """
    steps, cut = plan.steps or affordable(dataset, plan), dataset.meta.cut_valid
    decision = {"steps": steps, "learning_rate": plan.rate, "trials": {}, "calibrators": {}, "validation": {}, "blend": None}
    if not teaches(dataset, cut, plan.named_tasks):
        return {**decision, "notes": [UNCALIBRATED_NOTE]}
    total = max(1, round(steps * VALIDATION_SHARE / (1 - VALIDATION_SHARE)))
    first = start(dataset, cut, replace(plan, encoder=origins.validation_folder), total)
    pools = window_pools(dataset, first, plan)
    if not pools:
        return {**decision, "notes": [UNCALIBRATED_NOTE]}
    writer = GroupWriter(dataset, first.writer.prompts, first.writer.tasks, dataset.meta.cut_test)
    main = next(iter(pools))
    rate, tried, spent = plan.rate, dict[float, float](), 0
    if plan.learning_rate is None and plan.base is None:
        how, asked = Trials(RATES, TRIAL_SHARE, TRIAL_LEAST, RATE_WORTH), {main: pools[main]}
        rate, tried, spent = try_rates(
            first, total, rate, how, lambda one: auc(*judge(one, writer, asked, TRIAL_CANDIDATES)[main]), report
        )
    looks = LOOKS if plan.steps is None else LOOKS[-1:]
    trainer = first.again(total - spent, rate) if spent else first
    found = _run(trainer, writer, pools, looks, plan.calibration, report)
    expected: Expected = found.pop("expected")
    trials = {f"{one:g}": round(reached, 5) for one, reached in tried.items()}
    notes = [WITHOUT_ENCODER_NOTE] if origins.refit and not origins.validation else []
    steps = max(1, round(steps * found.pop("share")))
    blend = None
    if plan.fusion and LABEL in expected:
        blend = _blend(dataset, plan, origins, pools, expected[LABEL], trainer.positions)
        notes += [] if blend else [NO_HEAD_NOTE]
    found["scale"] = fit(*expected[LABEL]).facts() if blend else None
    found |= {"steps": steps, "learning_rate": rate, "trials": trials, "blend": blend, "notes": [*notes, *found["notes"]]}
    return found


def window_pools(dataset: Dataset, trainer: Trainer, plan: RankerPlan) -> dict[str, Pool]:
    """The groups between the cuts, one for each member and day: their histories are as fresh as served ones, which the longer
    groups of training are not."""
    fresh = replace(plan.groups, least=1)
    return pools_of(dataset, taught_of(trainer.writer.tasks), dataset.meta.cut_valid, dataset.meta.cut_test, fresh, plan.seed)


def _blend(
    dataset: Dataset,
    plan: RankerPlan,
    origins: Origins,
    pools: Mapping[str, Pool],
    expected: tuple[npt.NDArray[np.float32], Answers],
    positions: Positions | None,
) -> Mapping[str, object] | None:
    """What late fusion learns from the validation run, as facts."""
    scores, labels = expected
    encoder = None if origins.validation_folder is None else Path(origins.validation_folder)
    return blend_facts(dataset, *labels_judged(pools), scores, labels, fit(scores, labels), encoder, plan.seed, positions)


def labels_judged(pools: Mapping[str, Pool]) -> tuple[Pool, list[int]]:
    """The pool of labels of the validation window, and its groups that `judge` asks about."""
    pool = pools[LABEL]
    return pool, [group for _, group in sampled(pool, _share(VALIDATION_CANDIDATES, list(pools).index(LABEL)))]


def recalibrated(dataset: Dataset, trainer: Trainer, plan: RankerPlan, held: Held) -> dict[str, tuple[Calibrator, Calibrator]]:
    """Task -> (the calibrator that the plan asks for, a Platt scale) of a refit, on the members it was not taught.

    Tasks with too few answers of either kind are left out: what noise moves is worse than what the longer training moved.
    """
    pools = {name: pool.only(held[pool.member]) for name, pool in window_pools(dataset, trainer, plan).items()}
    pools = {name: pool for name, pool in pools.items() if len(pool)}
    judged = judge(trainer, trainer.writer, pools)
    expected = at_mean_places(trainer, pools, judged)
    found = {name: (fit(*one, plan.calibration), fit(*one)) for name, one in expected.items()}
    enough = {
        name: min(label.sum(dtype=int), len(label) - label.sum(dtype=int)) >= HELD_LEAST for name, (_, label) in judged.items()
    }
    return {name: both for name, both in found.items() if enough[name] and both[0].method == plan.calibration}


def _run(
    trainer: Trainer,
    writer: GroupWriter,
    pools: Mapping[str, Pool],
    looks: Sequence[float],
    method: Method,
    report: Progress,
) -> dict[str, Any]:
    """The validation run: the share of its steps after which it was best, and scores, calibrators and measures of that moment."""
    main, found, expected = next(iter(pools)), list[Judged](), list[Expected]()
    for look in looks:
        trainer.run(max(1, round(look * trainer.steps)), lambda done, total: report("validate", done, total))
        found.append(judge(trainer, writer, pools))
        expected.append(at_mean_places(trainer, pools, found[-1]))
    best = 0 if auc(*found[0][main]) > auc(*found[-1][main]) + WORTH else len(looks) - 1
    calibrators = {name: fit(scores, labels, method) for name, (scores, labels) in expected[best].items()}
    return {
        "share": looks[best],
        "expected": expected[best],
        "calibrators": {name: calibrator.facts() for name, calibrator in calibrators.items()},
        "validation": {name: _measures(*judged, calibrators[name]) for name, judged in found[best].items()},
        "notes": [UNCALIBRATED_NOTE] if calibrators[main].method == "identity" else [],
    }


def judge(trainer: Trainer, writer: GroupWriter, pools: Mapping[str, Pool], candidates: int = VALIDATION_CANDIDATES) -> Judged:
    """Raw scores of a fixed sample of each task's groups through the serving engine, and their answers."""
    ids = list(dict.fromkeys(token for pair in trainer.labels.values() for token in pair))
    engine = Engine(trainer.model, ids)
    found: Judged = {}
    for place, (name, pool) in enumerate(pools.items()):
        yes, no = (engine.label_ids.index(token) for token in trainer.labels[name])
        parts = []
        chosen = sampled(pool, _share(candidates, place))
        for first in range(0, len(chosen), GROUPS_PER_PASS):
            batch = writer.write(pools, chosen[first : first + GROUPS_PER_PASS])
            logits = np.concatenate(engine.score(batch.requests))
            parts.append((logits[:, yes] - logits[:, no], batch.label.astype(np.int8)))
        found[name] = (np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
    return found


def at_mean_places(trainer: Trainer, pools: Mapping[str, Pool], judged: Judged) -> Expected:
    """What `judge` found with all of its candidates, the answers being those expected at the mean place; the same arrays where
    no positions are taken out."""
    if trainer.positions is None:
        return {**judged}
    found: Expected = {}
    for place, (name, (scores, labels)) in enumerate(judged.items()):
        chosen = sampled(pools[name], _share(VALIDATION_CANDIDATES, place))
        event = np.concatenate([pools[name].event[pools[name].candidates(group)] for _, group in chosen])
        found[name] = scores, at_mean_place(scores, labels, trainer.positions.shifts(name, event))
    return found


def _share(candidates: int, place: int) -> int:
    """How many of the candidates to judge on the task at a place gets."""
    return candidates if place == 0 else candidates // 4


def _measures(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int8], calibrator: Calibrator) -> dict[str, float]:
    return {
        "auc": round(auc(scores, labels), 5),
        "calibration_error": round(calibration_error(calibrator.probabilities(scores), labels), 5),
        "candidates": len(labels),
        "positives": int(labels.sum()),
    }


def affordable(dataset: Dataset, plan: RankerPlan) -> int:
    """Steps of the refit that fit into the minutes, with both preparations, the validation run and all judging counted in."""
    if plan.minutes is None:
        raise TrainingError("neither steps nor minutes were given; say how long to train")
    began = time.monotonic()
    trainer = start(dataset, dataset.meta.cut_test, plan, 1_000)
    trainer.run(1)  # the first step pays for what is done once
    ready = time.monotonic()
    each = seconds_per_step(trainer)
    left = plan.minutes * 60 - 3 * (ready - began) - (SPEED_STEPS + JUDGED / plan.loop.candidates) * each
    return max(10, int(left / each * (1 - VALIDATION_SHARE)))
