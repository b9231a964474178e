"""From a data folder to a complete encoder folder: choose on the validation window, then refit up to the test cut."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from retrieval.data.schema import Dataset
from retrieval.encoder import FACTS, VALIDATION, save_encoder
from retrieval.learn.checkpoint import DECISION, check_room, remembered, write_json
from retrieval.learn.clock import clock_of
from retrieval.learn.ranks import Ranks
from retrieval.learn.sessions import with_sessions
from retrieval.learn.start import EncoderPlan, identity_of, start
from retrieval.learn.train import Trainer
from retrieval.learn.validate import Decision, Progress, decide
from retrieval.llama import merge_lora


@dataclass(frozen=True)
class FitReport:
    """What a training reached. `trials` maps learning rates that were tried to Recall@100, `validation` steps of the validation
    run to Recall@100 (empty: nothing was tried, nothing was asked). `seconds` are the plan's clock's."""

    folder: str
    fingerprint: str
    steps: int
    learning_rate: float
    seconds: float
    parameters: int
    trials: dict[float, float]
    validation: dict[int, float]
    note: str


def train_encoder(dataset: Dataset, out: Path, plan: EncoderPlan, progress: Progress | None = None) -> FitReport:
    """Trains an encoder and leaves a complete folder at `out`, and the one of its validation run at `out`/validation.

    A killed run of the same plan on the same data goes on from its checkpoint; another plan or other data is a TrainingError.
    Of several processes (`retrieval.learn.ranks`) the first writes; `out` is a folder that all of them see.
    """
    clock, report, ranks = clock_of(plan.clock), progress or (lambda _stage, _done, _total: None), Ranks.here()
    started = clock()
    check_room(out, FACTS, "an encoder")
    identity = identity_of(dataset, plan)
    dataset, note = with_sessions(dataset, plan.seed)
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    ranks.wait()  # nobody writes before everybody has looked
    decision = _decision(dataset, out, plan, identity, note, report)
    chosen = replace(plan, learning_rate=decision.learning_rate)
    trainer = start(dataset, dataset.meta.cut_test, chosen, decision.steps, identity)
    checkpoint = work / "checkpoint"
    trainer.resume(checkpoint)
    ranks.wait()
    saves = ranks.leads or plan.loop.shard
    trainer.run(decision.steps, lambda done, total: report("train", done, total), checkpoint if saves else None)
    fingerprint = _save(out, trainer, plan, dataset, dataset.meta.cut_test, note, decision)
    found = FitReport(
        folder=str(out),
        fingerprint=fingerprint,
        steps=trainer.done,
        learning_rate=decision.learning_rate,
        seconds=round(clock() - started, 1),
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        trials=decision.trials,
        validation=decision.validation,
        note=note,
    )
    if ranks.leads:
        with (work / "curve.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(point) + "\n" for point in trainer.curve)
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_json(work / "report.json", asdict(found))
    return found


def _decision(
    dataset: Dataset, out: Path, plan: EncoderPlan, identity: dict[str, object], note: str, report: Progress
) -> Decision:
    """What a killed run of this training decided, or the outcome of the validation run, whose encoder is saved first."""
    work = out / "training"
    held = remembered(work, identity)
    Ranks.here().wait()
    if held is not None:
        trials = {float(rate): recall for rate, recall in held["trials"].items()}
        validation = {int(step): recall for step, recall in held["validation"].items()}
        return Decision(held["steps"], held["learning_rate"], trials, validation)
    decision, trainer = decide(dataset, plan, identity, report)
    if trainer is not None:
        _save(out / VALIDATION, trainer, plan, dataset, dataset.meta.cut_valid, note, decision)
    if Ranks.here().leads:
        write_json(work / DECISION, {"identity": identity, **asdict(decision)})
    return decision


def _save(folder: Path, trainer: Trainer, plan: EncoderPlan, dataset: Dataset, cut: int, note: str, decision: Decision) -> str:
    """Writes a complete encoder folder that says up to when (`cut`) its training looked; returns its fingerprint.

    All processes must call; the first writes, the others return "".
    """
    model = trainer.whole(keep=trainer.ranks.leads)
    if not trainer.ranks.leads:
        return ""
    if plan.lora_rank:
        merge_lora(model)
    # How the length was asked for is no fact about the model: --minutes and --steps that end at one length are one model.
    asked = ("steps", "minutes", "clock", "validation", "base", "learning_rate")
    settings = {name: value for name, value in asdict(plan).items() if name not in asked}
    facts = {
        "settings": {**settings, "loop": asdict(trainer.settings)},
        "steps": trainer.done,
        "data": dataset.meta.name,
        "cut": cut,
        "note": note,
        "trials": {str(rate): recall for rate, recall in decision.trials.items()},
    }
    loop = plan.loop
    return save_encoder(folder, model, trainer.sampler.writer, facts, pooling=loop.pooling, matryoshka=loop.matryoshka)
