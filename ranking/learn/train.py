"""From a data folder to a complete ranker folder: length and calibration on the validation window, then the final fit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ranking.calibrate import Calibrator, auc, calibration_error, fit
from ranking.learn.batches import Choice, GroupWriter
from ranking.learn.examples import Pool, pools_of
from ranking.learn.loop import Trainer
from ranking.learn.start import RankerPlan, encoder_fingerprint, start
from ranking.prefill.engine import Engine
from ranking.prefill.plan import Limits
from ranking.ranker import FACTS, RankerFacts, save_ranker
from ranking.tasks import ENGAGE, tasks_of
from retrieval.data.schema import Dataset
from retrieval.learn.checkpoint import DECISION, TrainingError, check_room, remembered, write_json
from retrieval.learn.sessions import with_sessions
from retrieval.llama import merge_lora

VALIDATION_SHARE = 0.3
"""Share of all steps that goes to the validation run; the refit gets the rest."""
VALIDATION_CANDIDATES = 6_000
"""Candidates of each task that the validation run is judged and calibrated on, at most."""
LOOKS = (0.6, 1.0)
"""Shares of the validation run at which it is judged."""
WORTH = 0.002
"""AUC by which an earlier look must be better to shorten the refit: less is noise."""
TRIAL_STEPS = 4
GROUPS_PER_PASS = 64
SAMPLED_NOTE = (
    "no labels and no impressions in this folder: engagements against random catalogue items, so probabilities compare "
    "candidates but are no rates"
)
UNCALIBRATED_NOTE = "too few answers between the cuts: probabilities are not calibrated"

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""
Judged = dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]]
"""Task -> raw scores [n] and answers [n] of the validation window."""


@dataclass(frozen=True)
class TrainReport:
    """What a training reached. `validation` task -> AUC, calibration error, candidates of the validation run (empty: nothing
    was there to judge); `tokens_per_second` of the refit."""

    folder: str
    fingerprint: str
    steps: int
    seconds: float
    parameters: int
    tokens_per_second: float
    tasks: list[str]
    validation: dict[str, dict[str, float]]
    note: str


def train_ranker(dataset: Dataset, out: Path, plan: RankerPlan, progress: Progress | None = None) -> TrainReport:
    """Train a ranker and leave a complete folder at `out`. A killed run of the same plan goes on from its checkpoint.

    The weights depend on the data, the plan and the number of steps, not on how that number was found. Raises
    TrainingError, NothingToLearn, and what is wrong with a checkpoint or an encoder.
    """
    began, report = time.monotonic(), progress or (lambda _stage, _done, _total: None)
    check_room(out, FACTS, "a ranker")
    dataset, note = with_sessions(dataset, plan.seed)
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    decision = remembered(work, asdict(plan))
    if decision is None:
        decision = {"plan": asdict(plan), **_decide(dataset, plan, report)}
        write_json(work / DECISION, decision)
    trainer = start(dataset, dataset.meta.cut_test, plan, decision["steps"])
    trainer.resume(work / "checkpoint")
    running, tokens = time.monotonic(), trainer.tokens
    trainer.run(decision["steps"], lambda done, total: report("train", done, total), work / "checkpoint")
    speed = (trainer.tokens - tokens) / max(time.monotonic() - running, 1e-9)
    if plan.lora_rank:
        merge_lora(trainer.model)
    calibrators = {name: Calibrator.from_facts(facts) for name, facts in decision["calibrators"].items()}
    notes = [note, SAMPLED_NOTE if ENGAGE in trainer.writer.tasks and not note else "", decision["note"]]
    facts = _facts(dataset, plan, trainer, calibrators, "; ".join(filter(None, notes)))
    with (work / "curve.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(point) + "\n" for point in trainer.curve)
    fingerprint = save_ranker(out, trainer.model, trainer.writer.prompts, facts)
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    found = TrainReport(
        folder=str(out),
        fingerprint=fingerprint,
        steps=trainer.done,
        seconds=round(time.monotonic() - began, 1),
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        tokens_per_second=round(speed),
        tasks=list(facts.tasks),
        validation=decision["validation"],
        note=str(facts.training["note"]),
    )
    write_json(work / "report.json", asdict(found))
    return found


def _facts(dataset: Dataset, plan: RankerPlan, trainer: Trainer, calibrators: Mapping[str, Calibrator], note: str) -> RankerFacts:
    # How the length was asked for is no fact about the model: --minutes and --steps that end at one length are one model.
    settings = {name: value for name, value in asdict(plan).items() if name not in ("steps", "minutes", "base", "encoder")}
    training = {
        "data": dataset.meta.name,
        "cut": dataset.meta.cut_test,
        "steps": trainer.done,
        "settings": settings,
        "note": note,
    }
    return RankerFacts(
        tasks=trainer.writer.tasks,
        labels=trainer.labels,
        budgets=plan.budgets,
        calibrators=calibrators,
        encoder=encoder_fingerprint(plan),
        training={**training, "settings": settings},
    )


def _decide(dataset: Dataset, plan: RankerPlan, report: Progress) -> dict[str, Any]:
    """Steps of the refit, calibrators, and what the validation run reached.

    The speed of a few steps turns minutes into steps; from there on everything follows from the number of steps.
    """
    steps = plan.steps or _affordable(dataset, plan)
    tasks = tasks_of(dataset)
    pools = pools_of(dataset, tasks, dataset.meta.cut_valid, dataset.meta.cut_test, plan.groups, plan.seed)
    if not pools or not pools_of(dataset, tasks, None, dataset.meta.cut_valid, plan.groups, plan.seed):
        return {"steps": steps, "calibrators": {}, "validation": {}, "note": UNCALIBRATED_NOTE}
    trial = max(1, round(steps * VALIDATION_SHARE / (1 - VALIDATION_SHARE)))
    trainer = start(dataset, dataset.meta.cut_valid, plan, trial)
    writer = GroupWriter(dataset, trainer.writer.prompts, tasks, dataset.meta.cut_test)
    main, looks = next(iter(pools)), list[Judged]()
    for look in LOOKS if plan.steps is None else LOOKS[-1:]:
        trainer.run(max(1, round(look * trial)), lambda done, total: report("validate", done, total))
        looks.append(judge(trainer, writer, pools))
    judged = looks[-1]
    if auc(*looks[0][main]) > auc(*judged[main]) + WORTH:
        steps, judged = max(1, round(steps * LOOKS[0])), looks[0]
    calibrators = {name: fit(scores, labels) for name, (scores, labels) in judged.items()}
    return {
        "steps": steps,
        "calibrators": {name: calibrator.facts() for name, calibrator in calibrators.items()},
        "validation": {name: _measures(*judged[name], calibrators[name]) for name in judged},
        "note": UNCALIBRATED_NOTE if calibrators[main].method == "identity" else "",
    }


def judge(trainer: Trainer, writer: GroupWriter, pools: Mapping[str, Pool]) -> Judged:
    """Raw scores of a fixed sample of each task's groups through the serving engine, and their answers."""
    ids = list(dict.fromkeys(token for pair in trainer.labels.values() for token in pair))
    engine = Engine(trainer.model, ids, limits=Limits(max_positions=trainer.model.config.max_position_embeddings))
    found: Judged = {}
    for place, (name, pool) in enumerate(pools.items()):
        yes, no = (engine.label_ids.index(token) for token in trainer.labels[name])
        parts = []
        chosen = sampled(pool, VALIDATION_CANDIDATES // (1 if place == 0 else 4))
        for first in range(0, len(chosen), GROUPS_PER_PASS):
            batch = writer.write(pools, chosen[first : first + GROUPS_PER_PASS])
            logits = np.concatenate(engine.score(batch.requests))
            parts.append((logits[:, yes] - logits[:, no], batch.label.astype(np.int8)))
        found[name] = (np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
    return found


def sampled(pool: Pool, candidates: int) -> list[Choice]:
    """About that many candidates' groups of a pool, always the same ones."""
    order = np.random.default_rng(5).permutation(len(pool))
    total = np.cumsum(np.diff(pool.start)[order])
    return [(pool.task, group) for group in np.sort(order[: int(np.searchsorted(total, candidates)) + 1]).tolist()]


def _measures(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int8], calibrator: Calibrator) -> dict[str, float]:
    return {
        "auc": round(auc(scores, labels), 5),
        "calibration_error": round(calibration_error(calibrator.probabilities(scores), labels), 5),
        "candidates": len(labels),
        "positives": int(labels.sum()),
    }


def _affordable(dataset: Dataset, plan: RankerPlan) -> int:
    """Steps of the refit that fit into the minutes, with both preparations and the validation run counted in."""
    if plan.minutes is None:
        raise TrainingError("neither steps nor minutes were given; say how long to train")
    began = time.monotonic()
    trainer = start(dataset, dataset.meta.cut_test, plan, 1_000)
    trainer.run(1)  # the first step pays for what is done once
    ready = time.monotonic()
    trainer.run(1 + TRIAL_STEPS)
    each = (time.monotonic() - ready) / TRIAL_STEPS
    left = plan.minutes * 60 - 3 * (ready - began) - TRIAL_STEPS * each
    return max(10, int(left / each * (1 - VALIDATION_SHARE)))
