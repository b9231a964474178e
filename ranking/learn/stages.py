"""A plan becomes rankers: each stage from the one before, a complete folder, asked the same suite, gated before the next begins.

    OUT/0-start/             step 0: words, numbers and first weights
    OUT/answers/FINGERPRINT/ what a stage's parent said of the training groups, for alignment
    OUT/N-STAGE/             a ranker folder, and stage/ with the record, the scores and the learning curve
    OUT/results.json, results.md

A record names all that decides its bytes; the same command goes on where it stopped. Late fusion is no stage: train it after.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from index.durable import write_durably
from ranking.calibrate import ENOUGH, Calibrator, fit
from ranking.learn.chain import Progress, loaded, measures_of, remembered_step
from ranking.learn.compress import GateFailed, alone
from ranking.learn.distill import Answers
from ranking.learn.examples import held_back
from ranking.learn.gates import Check, judge, measure
from ranking.learn.loop import Trainer
from ranking.learn.positions import applies, known_shifts, places_of
from ranking.learn.questions import Ground, ground_of
from ranking.learn.stages_plan import Align, AnyStage, Instructions, StageGate, StagesPlan, Text, facts_of
from ranking.learn.stages_suite import Suite
from ranking.learn.stages_table import Done, markdown, row_of
from ranking.learn.stages_train import Aligner, Reader, loop_of
from ranking.learn.start import origins_of, start
from ranking.learn.variety import Variety
from ranking.ranker import FACTS, READS_WISHES, Ranker, RankerFacts, save_ranker
from ranking.tasks_file import task_of, taught_tasks
from retrieval.data.read import read_dataset
from retrieval.data.schema import DAY, Dataset
from retrieval.evidence.report import without_nan
from retrieval.fingerprint import FingerprintMismatch
from retrieval.learn.checkpoint import DATA, TrainingError, check_identity, dataset_digest, write_json
from retrieval.learn.loop import Loop
from retrieval.learn.prepare import known_items

WORK, RECORD, SCORES = "stage", "step.json", "scores.npz"
RESULTS, TABLE = "results.json", "results.md"
START = "0-start"


def run_stages(plan: StagesPlan, tell: Progress) -> dict[str, Any]:
    """Every stage is done, or the first one stopped that did not pass its gate; returns what OUT/results.json holds.

    Raises what is wrong with the plan, the data or the start before anything is trained.
    """
    with alone(plan.out):
        dataset = read_dataset(plan.data)
        chain = Stages(plan, dataset, _begin(plan, dataset), tell)
        parent = chain.step(0, None, None)
        done = [parent]
        chain.write(done)
        for number, stage in enumerate(plan.stages):
            if parent.refused:
                break
            parent = chain.step(number + 1, stage, parent)
            done.append(parent)
            chain.write(done)
        return chain.write(done)


def refuse_if_stopped(found: Mapping[str, Any], plan: StagesPlan) -> None:
    """Raises GateFailed with the reason if a stage did not pass its gate."""
    if found["stopped"]:
        raise GateFailed(f"stopped at a gate ({found['stopped']}); the table is {plan.out / TABLE}")


def planned(plan: StagesPlan) -> list[dict[str, object]]:
    """What would be done, without reading the data: one row per stage."""
    return [
        {
            "stage": stage.name,
            "kind": stage.kind,
            "steps": stage.steps,
            "there": (plan.out / f"{number + 1}-{stage.name}" / WORK / RECORD).is_file(),
        }
        for number, stage in enumerate(plan.stages)
    ]


def _begin(plan: StagesPlan, dataset: Dataset) -> Ranker:
    """Step 0 as a ranker folder."""
    wanted, folder = plan.ranker(), plan.out / START
    if plan.surface and plan.surface not in dataset.events.surfaces:
        there = ", ".join(dataset.events.surfaces) or "none"
        raise TrainingError(f"surface {plan.surface!r} is not in {dataset.meta.name}; it has {there}")
    if wanted.tasks:
        taught_tasks(dataset, wanted.named_tasks)
    origins = origins_of(dataset, wanted)
    settings = {**asdict(replace(wanted, encoder=None)), "encoder": origins.refit}
    identity = {"start": settings, DATA: dataset_digest(dataset)}
    if (folder / FACTS).is_file():
        check_identity(folder, json.loads((folder / "identity.json").read_text(encoding="utf-8")), identity)
        return Ranker.load(folder, device=plan.device)
    first = start(dataset, dataset.meta.cut_test, wanted, 1, held=held_back(dataset, plan.seed))
    training: dict[str, Any] = {"data": dataset.meta.name, "cut": dataset.meta.cut_test, "steps": 0, "settings": settings}
    if applies(dataset, wanted.positions):
        training["positions"] = {"ridge": wanted.positions.ridge, "curve": []}
    facts = RankerFacts(
        first.writer.tasks, first.labels, wanted.budgets, {}, origins.refit, training, wanted.layout, first.writer.prompts.shots
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "identity.json", identity)
    save_ranker(folder, first.model, first.writer.prompts, facts)
    return Ranker.load(folder, device=plan.device)


class Stages:
    """The stages of one plan over one data set."""

    def __init__(self, plan: StagesPlan, dataset: Dataset, first: Ranker, tell: Progress) -> None:
        """Raises NothingToJudge, and what is wrong with the suite's tasks."""
        self.plan, self.dataset, self.first, self.tell = plan, dataset, first, tell
        ground = ground_of(dataset, first, plan.judged)
        self.ground = self._without_surface(ground) if plan.surface else ground
        self.suite = Suite(plan, dataset, self.ground, first)

    def _without_surface(self, ground: Ground) -> Ground:
        """The ground without what is to be learned on the plan's surface, whose places are unknown, too."""
        log, tasks = self.dataset.events, ground.writer.tasks
        other = log.surface != log.surfaces.index(self.plan.surface)
        pools = {name: pool.where((pool.event < 0) | other[pool.event]) for name, pool in ground.pools.items()}
        if not len(pools[ground.main]):
            raise TrainingError(f"all answers to {ground.main!r} are on surface {self.plan.surface!r}; nothing is left to learn")
        pools = {name: pool for name, pool in pools.items() if len(pool)}
        places = None if ground.places is None else places_of(self.dataset, pools, tasks, ground.places.settings)
        return replace(ground, pools=pools, places=places)

    def step(self, number: int, stage: AnyStage | None, parent: Done | None) -> Done:
        """A stage, done now or before; None is step 0, which is only judged."""
        name = START if stage is None else f"{number}-{stage.name}"
        folder, work = self.plan.out / name, self.plan.out / name / WORK
        identity = self._identity(stage, parent)
        record = remembered_step(work, identity)
        if record is None:
            began = time.monotonic()
            work.mkdir(parents=True, exist_ok=True)
            if stage is not None and parent is not None:
                self._learn(stage, parent, folder, work, identity)
            record = {"identity": identity, **self._judged(folder, work, parent)}
            record["seconds"] = round(time.monotonic() - began, 1)
            write_durably(work / RECORD, f"{json.dumps(record, indent=1)}\n".encode())
            shutil.rmtree(work / "checkpoint", ignore_errors=True)
        gate = StageGate() if stage is None else stage.gate
        checks = judge(measures_of(record["measured"]), gate.lost) if gate.lost and record["measured"] else []
        with np.load(work / SCORES) as held:
            refused = _refused(checks, gate, record["suite"])
            return Done(name, folder, record, held["held"], held["test"], held["said"], checks, refused)

    def _identity(self, stage: AnyStage | None, parent: Done | None) -> dict[str, object]:
        """All that decides a stage's bytes and what its record says."""
        plan = self.plan
        unseen = None if plan.unseen is None else task_of(plan.unseen).facts()  # what it asks, not where that is written
        asked = {"judged": plan.judged, "lists": plan.lists, "unseen": unseen, "surface": plan.surface}
        own = {"stage": None if stage is None else facts_of(stage), "seed": plan.seed, "calibration": plan.calibration}
        before = self.first.fingerprint if parent is None else str(parent.record["fingerprint"])
        return {**own, "parent": before, DATA: self.ground.digest, **asked}

    def _learn(self, stage: AnyStage, parent: Done, folder: Path, work: Path, identity: Mapping[str, object]) -> None:
        before = Ranker.load(parent.folder)
        if before.fingerprint != parent.record["fingerprint"]:
            expected = str(parent.record["fingerprint"])
            raise FingerprintMismatch(str(parent.folder), before.fingerprint, expected, "remove the folder, start again")
        facts = before.facts
        del before  # its weights are no use while others are learned
        run = self._run(stage, parent, identity)
        if isinstance(run, Trainer) and run.positions is not None:
            run.positions.begin(facts.training)
        run.resume(work / "checkpoint")
        run.run(stage.steps, lambda done, total: self.tell(stage.name, done, total), work / "checkpoint")
        curve = "".join(json.dumps(point) + "\n" for point in run.curve)
        (work / "curve.jsonl").write_text(curve, encoding="utf-8")
        self._save(stage, run, facts, folder)

    def _run(self, stage: AnyStage, parent: Done, identity: Mapping[str, object]) -> Loop:
        torch.manual_seed(self.plan.seed)
        ground, seed = self.ground, self.plan.seed
        model = loaded(parent.folder).to(self.plan.device)
        if isinstance(stage, Text):
            return Reader(model, self._texts(), self.first.prompts.tokens.pad, stage, identity, seed)
        parts = (ground.writer, ground.pools, ground.labels)
        if isinstance(stage, Align):
            return Aligner(model, *parts, stage, identity, seed, self._answers(parent), ground.places)
        variety = None
        if isinstance(stage, Instructions):
            variety = Variety(self.dataset.items, ground.writer.tasks, stage.wishes, seed)
        return Trainer(model, *parts, stage.steps, loop_of(stage), identity, seed, variety, ground.places)

    def _texts(self) -> list[list[int]]:
        """What is read: items known before the test cut, and members' pasts, of members held back those before the first cut."""
        meta, writer = self.dataset.meta, self.ground.writer
        items = known_items(self.dataset, meta.cut_test)
        rows = writer.item_rows(items, np.full(len(items), meta.cut_test // DAY))
        held, task = held_back(self.dataset, self.plan.seed), next(iter(writer.tasks.values()))
        moments = np.where(held, meta.cut_valid, meta.cut_test).tolist()
        return [*rows, *(writer.prefix(member, moment, task) for member, moment in enumerate(moments))]

    def _answers(self, parent: Done) -> Answers:
        """What the stage before says of all training candidates, kept under its fingerprint."""
        fingerprint = str(parent.record["fingerprint"])
        ground = self.ground
        kept = Answers(
            self.plan.out / "answers" / fingerprint, ground.pools, {"teacher": fingerprint, DATA: ground.digest}, states=False
        )
        model: LlamaForCausalLM = loaded(parent.folder).to(self.plan.device)
        kept.fill(model, ground.labels, ground.writer, lambda done, of: self.tell("stage before", done, of))
        return kept

    def _save(self, stage: AnyStage, run: Loop, before: RankerFacts, folder: Path) -> None:
        """A complete ranker folder with calibrators of its own; tasks with too few answers held back have none."""
        ground, prompts = self.ground, self.first.prompts
        assert isinstance(run.model, LlamaForCausalLM)
        ranker = Ranker.of(run.model, prompts, before, "")
        past = [*before.training.get("stages", []), dict(facts_of(stage))]
        training = {**before.training, "stages": past, "steps": before.training["steps"] + stage.steps}
        if isinstance(stage, Instructions) and stage.wishes:
            training[READS_WISHES] = True
        if isinstance(run, Trainer) and run.positions is not None:
            training["positions"] = run.positions.facts()
        if "positions" in training:  # a stage that reads has none of its own; its labels stood where they stood before
            parts = [(name, ground.writer.tasks[name], one.event) for name, one in ground.held.items()]
            shifts = {name: known_shifts(self.dataset, training, task, event) for name, task, event in parts}
            ground = replace(ground, shifts=shifts)
        raw = {name: one.scores(ranker.engine, ground.labels) for name, one in ground.held.items() if one.rarer >= ENOUGH}
        fitted = {name: fit(one, ground.expected(name, one), self.plan.calibration) for name, one in raw.items()}
        save_ranker(folder, run.model, prompts, replace(before, calibrators=fitted, training=training))

    def _judged(self, folder: Path, work: Path, parent: Done | None) -> dict[str, Any]:
        """Scores of the folder as it is loaded to serve, on disk; what it lost, and what the suite says."""
        ranker, ground = Ranker.load(folder, device=self.plan.device), self.ground
        held, test = (part.scores(ranker.engine, ground.labels) for part in (ground.asked, ground.test))
        said = ranker.facts.calibrators.get(ground.main, Calibrator()).probabilities(test)
        np.savez(work / SCORES, held=held, test=test, said=said)
        asked, measured = ground.asked, dict[str, object]()
        if parent is not None:
            found = measure(asked.label, asked.member, parent.held, held, self.plan.calibration)
            measured = {name: without_nan(asdict(one)) for name, one in found.items()}
        suite = {name: round(value, 6) for name, value in self.suite.of(ranker).items() if np.isfinite(value)}
        return {"fingerprint": ranker.fingerprint, "measured": measured, "suite": suite}

    def write(self, done: list[Done]) -> dict[str, Any]:
        """Both result files, each whole or not at all; returns what the first one holds."""
        stopped = [f"{one.name}: {one.refused}" for one in done if one.refused]
        rows = [row_of(one, self.ground.test.label, self.ground.test.member) for one in done]
        sizes = {"test_candidates": len(self.ground.test.label), "held_candidates": len(self.ground.asked.label)}
        content = {"name": self.plan.name, "task": self.ground.main, **sizes, "rows": rows, "stopped": "; ".join(stopped)}
        held = json.dumps(without_nan(content), indent=1, allow_nan=False)
        write_durably(self.plan.out / RESULTS, f"{held}\n".encode())
        write_durably(self.plan.out / TABLE, markdown(content).encode())
        return content


def _refused(checks: list[Check], gate: StageGate, suite: Mapping[str, float]) -> str:
    """Every line of a gate that does not hold, in words; a measure that is missing does not."""
    broken = [f"{one.metric} lost {one.measure.lost:+.4f}, limit {one.limit:g}" for one in checks if not one.passed]
    for name, limit in gate.least.items():
        if not suite.get(name, np.nan) >= limit:
            broken.append(f"{name} {suite.get(name, np.nan):.4f}, least {limit:g}")
    for name, limit in gate.most.items():
        if not suite.get(name, np.nan) <= limit:
            broken.append(f"{name} {suite.get(name, np.nan):.4f}, most {limit:g}")
    return "; ".join(broken)
