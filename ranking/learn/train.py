"""From a data folder to a complete ranker folder: length and calibration on the validation window, then the final fit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ranking.calibrate import Calibrator
from ranking.fusion import FORMAT as FUSION_FORMAT
from ranking.learn.examples import held_back, teaches
from ranking.learn.fuse import head_of
from ranking.learn.loop import Trainer
from ranking.learn.positions import applies
from ranking.learn.start import Origins, RankerPlan, origins_of, start
from ranking.learn.validate import Progress, decide, labels_judged, recalibrated, window_pools
from ranking.ranker import FACTS, READS_WISHES, RankerFacts, save_ranker
from ranking.tasks import ENGAGE, LABEL
from ranking.tasks_file import taught_tasks
from retrieval.data.schema import Dataset
from retrieval.learn.checkpoint import DATA, DECISION, check_room, dataset_digest, remembered, write_json
from retrieval.learn.sessions import with_sessions
from retrieval.llama import merge_lora

SAMPLED_NOTE = (
    "no labels and no impressions in this folder: engagements against random catalogue items, so probabilities compare "
    "candidates but are no rates"
)


@dataclass(frozen=True)
class TrainReport:
    """What a training reached. `trials` learning rate -> AUC of its trial (empty: none tried); `validation` task -> AUC,
    calibration error, candidates of the validation run (empty: nothing was there to judge); `tokens_per_second` of the refit;
    `positions` what each place added to a logit in training (empty: no impressions with positions)."""

    folder: str
    fingerprint: str
    steps: int
    learning_rate: float
    trials: dict[str, float]
    seconds: float
    parameters: int
    tokens_per_second: float
    tasks: list[str]
    validation: dict[str, dict[str, float]]
    note: str
    positions: list[dict[str, object]] = field(default_factory=list)


def train_ranker(dataset: Dataset, out: Path, plan: RankerPlan, progress: Progress | None = None) -> TrainReport:
    """Train a ranker and leave a complete folder at `out`. A killed run goes on from its checkpoint if the plan, the data and
    the encoder are the same.

    The weights depend on the data, the plan, the number of steps and the learning rate, not on how those were found. Raises
    TrainingError, NothingToLearn, TrainedTooLate, and what is wrong with a checkpoint or an encoder.
    """
    began, report = time.monotonic(), progress or (lambda _stage, _done, _total: None)
    check_room(out, FACTS, "a ranker")
    note = ""
    if plan.tasks:
        taught_tasks(dataset, plan.named_tasks)
    elif not teaches(dataset, dataset.meta.cut_test):
        dataset, note = with_sessions(dataset, plan.seed)
    origins = origins_of(dataset, plan)
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    identity = _identity(dataset, plan, origins)
    decision = remembered(work, identity)
    if decision is None:
        decision = {"identity": identity, **decide(dataset, plan, origins, report)}
        write_json(work / DECISION, decision)
    chosen = replace(plan, learning_rate=decision["learning_rate"])
    held = held_back(dataset, plan.seed) if decision["calibrators"] else None
    trainer = start(dataset, dataset.meta.cut_test, chosen, decision["steps"], identity, held)
    trainer.resume(work / "checkpoint")
    running, tokens = time.monotonic(), trainer.tokens
    trainer.run(decision["steps"], lambda done, total: report("train", done, total), work / "checkpoint")
    speed = (trainer.tokens - tokens) / max(time.monotonic() - running, 1e-9)
    if plan.lora_rank:
        merge_lora(trainer.model)
    notes = [note, SAMPLED_NOTE if ENGAGE in trainer.writer.tasks and not note else "", *decision["notes"]]
    calibrators = {name: Calibrator.from_facts(one) for name, one in decision["calibrators"].items()}
    again = {} if held is None else recalibrated(dataset, trainer, plan, held)
    calibrators |= {name: wanted for name, (wanted, _) in again.items()}
    facts = _facts(dataset, plan, trainer, origins, decision, calibrators, "; ".join(filter(None, notes)))
    head = None
    if decision["blend"] is not None:
        scale = again[LABEL][1] if LABEL in again else Calibrator.from_facts(decision["scale"])
        pool, groups = labels_judged(window_pools(dataset, trainer, plan))
        encoder = None if plan.encoder is None else Path(plan.encoder)
        head = head_of(dataset, decision["blend"], pool, groups, scale, encoder, plan.seed, trainer.positions)
    with (work / "curve.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(point) + "\n" for point in trainer.curve)
    fingerprint = save_ranker(out, trainer.model, trainer.writer.prompts, facts, head)
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    found = _report(out, fingerprint, trainer, facts, decision, time.monotonic() - began, speed)
    write_json(work / "report.json", asdict(found))
    return found


def _report(
    out: Path, fingerprint: str, trainer: Trainer, facts: RankerFacts, decision: Mapping[str, Any], seconds: float, speed: float
) -> TrainReport:
    return TrainReport(
        folder=str(out),
        fingerprint=fingerprint,
        steps=trainer.done,
        learning_rate=decision["learning_rate"],
        trials=decision["trials"],
        seconds=round(seconds, 1),
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        tokens_per_second=round(speed),
        tasks=list(facts.tasks),
        validation=decision["validation"],
        note=str(facts.training["note"]),
        positions=[] if trainer.positions is None else trainer.positions.curve(),
    )


def _identity(dataset: Dataset, plan: RankerPlan, origins: Origins) -> dict[str, object]:
    """All that decides the weights. An encoder counts by what it holds, not by where it lies."""
    held = {"encoder": origins.refit, "validation_encoder": origins.validation}
    settings = asdict(replace(plan, encoder=None))
    if not applies(dataset, plan.positions):
        del settings["positions"]  # nothing of it moves a weight, and trainings begun before it existed go on
    if plan.share == 1:
        del settings["share"]
    if plan.fusion:
        settings["fusion"] = FUSION_FORMAT  # a blend that was decided for other features must not meet today's
    return {"plan": settings, DATA: dataset_digest(dataset), **held}


def _facts(
    dataset: Dataset,
    plan: RankerPlan,
    trainer: Trainer,
    origins: Origins,
    decision: Mapping[str, Any],
    calibrators: Mapping[str, Calibrator],
    note: str,
) -> RankerFacts:
    # How the length was asked for is no fact about the model: --minutes and --steps that end at one length are one model.
    asked = ("steps", "minutes", "base", "encoder", "learning_rate", "tasks", "layout", "positions", "share")
    settings = {name: value for name, value in asdict(plan).items() if name not in asked}
    tasks = trainer.writer.tasks
    return RankerFacts(
        tasks=tasks,
        labels=trainer.labels,
        budgets=plan.budgets,
        calibrators={name: calibrators[name] for name in tasks if name in calibrators},
        encoder=origins.refit,
        training={
            "data": dataset.meta.name,
            "cut": dataset.meta.cut_test,
            "steps": trainer.done,
            "trials": decision["trials"],
            "validation_encoder": origins.validation,
            "settings": {**settings, "loop": asdict(trainer.settings)},
            "note": note,
            **({} if trainer.positions is None else {"positions": trainer.positions.facts()}),
            **({} if plan.share == 1 else {"share": plan.share}),
            READS_WISHES: bool(plan.wishes or plan.base),
        },
        layout=plan.layout,
        shots=trainer.writer.prompts.shots,
    )
