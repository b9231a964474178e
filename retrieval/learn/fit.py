"""From a data folder to a complete encoder folder: choose the length on the validation window, then refit up to the test cut."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import FACTS, Encoder, save_encoder
from retrieval.evidence.protocol import EvidenceError, Queries, last_after_cut, member_views
from retrieval.features import Kind
from retrieval.learn.batches import BatchSettings, Sampler
from retrieval.learn.checkpoint import DECISION, TrainingError, check_room, remembered, write_json
from retrieval.learn.prepare import NothingToLearn, base_tokens, fit_quantizer, fit_tokens
from retrieval.learn.sessions import with_sessions
from retrieval.learn.train import LoopSettings, Trainer
from retrieval.learn.warm import start_from_words
from retrieval.llama import Size, add_lora, fit_vocabulary, load_llama, merge_lora, new_llama, smooth_buckets
from retrieval.writer import Budgets, Writer

VALIDATION_SHARE = 0.35
"""Share of the minutes that goes to the validation run; the refit gets the rest."""
VALIDATION_QUERIES = 400
VALIDATION_DAYS = 3
LOOKS = (0.5, 0.75, 1.0)
"""Shares of the validation run at which recall is read."""
WORTH = 0.02
"""Recall by which an earlier look must be better to shorten the refit: with VALIDATION_QUERIES queries less is noise."""
TRIAL_STEPS = 4

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class EncoderPlan:
    """All that decides the weights, apart from the data. One of `steps` and `minutes` says how long; `warm_words` starts a model
    from scratch with latent-semantic word vectors (`retrieval.learn.warm`)."""

    steps: int | None = None
    minutes: float | None = 5.0
    seed: int = 0
    base: str | None = None
    lora_rank: int | None = None
    quantizer: Kind = "percentile"
    warm_words: bool = True
    size: Size = field(default_factory=Size)
    budgets: Budgets = field(default_factory=Budgets)
    batch: BatchSettings = field(default_factory=BatchSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)


@dataclass(frozen=True)
class FitReport:
    """What a training reached. `validation` maps steps of the validation run to Recall@100 there (empty: nothing was asked)."""

    folder: str
    fingerprint: str
    steps: int
    seconds: float
    parameters: int
    validation: dict[int, float]
    note: str


def train_encoder(dataset: Dataset, out: Path, plan: EncoderPlan, progress: Progress | None = None) -> FitReport:
    """Trains an encoder and leaves a complete folder at `out`. A killed run of the same plan goes on from its checkpoint."""
    started, report = time.monotonic(), progress or (lambda _stage, _done, _total: None)
    check_room(out, FACTS, "an encoder")
    dataset, note = with_sessions(dataset, plan.seed)
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    cut = dataset.meta.cut_test
    decision = remembered(work, asdict(plan))
    if decision is None:
        steps, validation = _choose_length(dataset, plan, report)
        decision = {"plan": asdict(plan), "steps": steps, "validation": validation}
        write_json(work / DECISION, decision)
    trainer = start(dataset, cut, plan, decision["steps"])
    checkpoint = work / "checkpoint"
    trainer.resume(checkpoint)
    trainer.run(decision["steps"], lambda done, total: report("train", done, total), checkpoint)
    if plan.lora_rank:
        merge_lora(trainer.model)
    # How the length was asked for is no fact about the model: --minutes and --steps that end at one length are one model.
    settings = {name: value for name, value in asdict(plan).items() if name not in ("steps", "minutes", "base")}
    facts = {"settings": settings, "steps": trainer.done, "data": dataset.meta.name, "cut": cut, "note": note}
    with (work / "curve.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(point) + "\n" for point in trainer.curve)
    fingerprint = save_encoder(out, trainer.model, trainer.sampler.writer, facts)
    shutil.rmtree(checkpoint, ignore_errors=True)
    seconds, parameters = time.monotonic() - started, sum(weight.numel() for weight in trainer.model.parameters())
    validation = {int(step): value for step, value in decision["validation"].items()}
    found = FitReport(str(out), fingerprint, trainer.done, round(seconds, 1), parameters, validation, note)
    write_json(work / "report.json", asdict(found))
    return found


def start(dataset: Dataset, before: int, plan: EncoderPlan, steps: int) -> Trainer:
    """A trainer at step 0: quantizer and tokenizer fitted before `before`, the trunk new or from the base checkpoint."""
    torch.manual_seed(plan.seed)
    quantizer = fit_quantizer(dataset, before, plan.quantizer, plan.seed)
    if plan.base is None:
        tokens = fit_tokens(dataset, before, quantizer, plan.size.vocabulary)
        model: PreTrainedModel = new_llama(plan.size, len(tokens), causal_lm=False)
        if plan.warm_words:
            start_from_words(model, tokens, dataset, before, plan.seed)
    else:
        tokens = base_tokens(plan.base, quantizer)
        model = load_llama(plan.base, causal_lm=False)
        fit_vocabulary(model, tokens)
        if plan.lora_rank:
            add_lora(model, plan.lora_rank)
    smooth_buckets(model, tokens, quantizer)
    writer = Writer(tokens, quantizer, plan.budgets, dataset.meta.retrieval_actions)
    sampler = Sampler(dataset, writer, before, plan.batch, plan.seed)
    if not sampler.runs:
        raise NothingToLearn(f"{dataset.meta.name}: no engagement before the cut; nothing to train on")
    return Trainer(model, sampler, steps, plan.loop)


def _choose_length(dataset: Dataset, plan: EncoderPlan, report: Progress) -> tuple[int, dict[int, float]]:
    """The number of refit steps and what the validation run reached.

    With `--steps` the length is given. With `--minutes` the speed of a few trial steps decides it, and the validation run may
    shorten it where its recall peaked early.
    """
    if plan.steps is not None:
        return plan.steps, {}
    if plan.minutes is None:
        raise TrainingError("neither steps nor minutes were given; say how long to train")
    queries = _validation_queries(dataset)
    seconds = _seconds_per_step(dataset, plan)
    share = 1.0 if queries is None else 1 - VALIDATION_SHARE
    planned = max(10, int(share * plan.minutes * 60 / seconds))
    if queries is None:
        return planned, {}
    trial = max(10, int(VALIDATION_SHARE * plan.minutes * 60 / seconds))
    trainer = start(dataset, dataset.meta.cut_valid, plan, trial)
    found = {}
    for look in LOOKS:
        until = max(1, round(look * trial))
        trainer.run(until, lambda done, total: report("validate", done, total))
        found[until] = recall_at_100(trainer, dataset, queries)
    best = max(found, key=lambda step: found[step])
    if found[best] <= found[trial] + WORTH:
        return planned, found
    return round(best * planned / trial), found


def recall_at_100(trainer: Trainer, dataset: Dataset, queries: Queries) -> float:
    """Mean Recall@100 with live counts over the queries, whole catalogue, history excluded."""
    encoder = Encoder(trainer.model, trainer.sampler.writer, "", {})
    counts = Counts.from_dataset(dataset, dataset.meta.cut_test)
    records = [dataset.items[row] for row in range(len(dataset.items))]
    recalls = np.zeros(len(queries))
    for day in np.unique(queries.day):
        asked = np.flatnonzero(queries.day == day)
        vectors = encoder.items(records, counts.as_of(int(day) * DAY))
        members = encoder.members(member_views(dataset, queries.take(asked), newest=encoder.writer.budgets.member))
        scores = members @ vectors.T
        for row, query in enumerate(asked.tolist()):
            scores[row, queries.excluded[query]] = -np.inf
            best = np.argpartition(-scores[row], min(100, scores.shape[1] - 1))[:100]
            recalls[query] = np.isin(queries.targets[query], best).mean()
    trainer.model.train()
    return float(recalls.mean())


def _validation_queries(dataset: Dataset) -> Queries | None:
    """Queries of a few days of the validation window, or None where it asks nothing."""
    try:
        queries = last_after_cut(dataset, "valid")
    except EvidenceError:
        return None
    days = np.unique(queries.day)
    kept = days[np.linspace(0, len(days) - 1, min(VALIDATION_DAYS, len(days))).round().astype(int)]
    return queries.take(np.flatnonzero(np.isin(queries.day, kept))).sample(VALIDATION_QUERIES)


def _seconds_per_step(dataset: Dataset, plan: EncoderPlan) -> float:
    trainer = start(dataset, dataset.meta.cut_test, plan, 1_000)
    trainer.run(1)
    began = time.monotonic()
    trainer.run(1 + TRIAL_STEPS)
    return (time.monotonic() - began) / TRIAL_STEPS
