"""Experiments of rankers: each cell trains and judges one, with the files, rows and stops of the encoders' experiments."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ranking.evaluate import judge_scores, labelled_test_rows
from ranking.evidence import evaluate_ranking, write_ranking_report
from ranking.learn.settings import plan_of
from ranking.learn.start import RankerPlan
from ranking.learn.train import train_ranker
from ranking.learn.validate import VALIDATION_SHARE
from ranking.ranker import FACTS, Ranker
from ranking.scored import score_rows
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.learn.checkpoint import dataset_digest
from retrieval.learn.choose import Progress
from retrieval.learn.experiment import Kind, digest_of, foretold, kept, seconds_of_alike
from retrieval.learn.grid import JUDGED_BY, Experiment, ExperimentError, Run
from retrieval.learn.results import Row

PASSES = 6
"""Multiples of weights x tokens that a step costs: two forward, four backward."""


@dataclass(frozen=True)
class Job:
    """A `retrieval.learn.experiment.Cell` of rankers."""

    run: Run
    plan: RankerPlan
    digest: str
    model: str


def jobs_of(experiment: Experiment, datasets: Mapping[str, Dataset]) -> list[Job]:
    """The jobs of all cells; cells that say the same share a digest. Raises TrainingError for a setting that cannot be."""
    digests, found = {name: dataset_digest(dataset) for name, dataset in datasets.items()}, []
    for run in experiment.runs():
        counts = run.settings["counts"]
        if counts not in ("live", "frozen") or run.settings["dims"] is not None:
            raise ExperimentError(f"{run.words}: counts is {counts!r}; expected live or frozen, and no dims for a ranker")
        plan = plan_of({name: value for name, value in run.settings.items() if name not in JUDGED_BY})
        model = digest_of({"kind": "ranker", "plan": asdict(plan), "data": digests[run.data]})
        found.append(Job(run, plan, digest_of({"model": model, "counts": counts}), model))
    return found


def predicted_seconds(job: Job, experiment: Experiment, rows: Mapping[str, Row]) -> tuple[float, str]:
    """How long a job may take, and what this was taken from: rows of equal shape, the minutes asked for, or arithmetic."""
    plan = job.plan
    tokens = plan.loop.candidates * (plan.budgets.item + plan.budgets.prefix / plan.groups.least)
    step = PASSES * plan.size.multiplied * tokens / experiment.speed
    return foretold(seconds_of_alike(job.run.data, shape_of(plan), rows), plan.minutes, plan.steps, step / (1 - VALIDATION_SHARE))


def shape_of(plan: RankerPlan) -> str:
    """What decides how long a training takes."""
    return digest_of([asdict(plan.size), asdict(plan.budgets), plan.loop.candidates, plan.steps, plan.minutes, plan.base])


def _row(experiment: Experiment, job: Job, dataset: Dataset, progress: Progress) -> Row:
    folder = experiment.out / "models" / job.model

    def work() -> Row:
        return {**_trained(job, dataset, folder, progress), **_judged(experiment, job, dataset, folder, progress)}

    return kept(job, shape_of(job.plan), work)


def _trained(job: Job, dataset: Dataset, folder: Path, progress: Progress) -> Row:
    """Trains unless the folder is complete, as it is for a cell that is only judged in another way."""
    path = folder / "training" / "report.json"
    there = (folder / FACTS).is_file() and path.is_file()
    if not there:
        (folder / FACTS).unlink(missing_ok=True)  # a kill between the two files leaves a folder that could never be judged
        train_ranker(dataset, folder, job.plan, progress)
    report = json.loads(path.read_text(encoding="utf-8"))
    facts = {name: report[name] for name in ("steps", "learning_rate", "parameters", "fingerprint", "note")}
    return {**facts, "train_seconds": 0.0 if there else report["seconds"]}


def _judged(experiment: Experiment, job: Job, dataset: Dataset, folder: Path, progress: Progress) -> Row:
    """Judges as `brewline evaluate ranking` does, without baselines, and leaves the same files for paired tests."""
    began, counts = time.monotonic(), job.run.settings["counts"]
    ranker, rows = Ranker.load(folder), labelled_test_rows(dataset)
    encoder = None if job.plan.encoder is None else Encoder.load(Path(job.plan.encoder))
    scores = score_rows(dataset, rows, ranker, counts, encoder, lambda done, total: progress("evaluate", done, total))
    report = evaluate_ranking(dataset, rows, [], counts, scores)
    write_ranking_report(report, rows, scores, experiment.out / "judged" / job.digest)
    assert report.model is not None
    found: Row = {"events": len(rows), "members": report.facts["members"]}
    for name, judged in (("", report.model.judged), ("text ", judge_scores(rows, scores.text))):
        found |= {f"{name}{metric}": value for metric, value in judged.metrics.items()}
        found |= {f"{name}auc low": judged.auc.low, f"{name}auc high": judged.auc.high}
    for name, one in report.model.judged.slices.items():
        found |= {f"{name} auc": one.get("auc"), f"{name} n": one["n"]}
    return {**found, "evaluate_seconds": round(time.monotonic() - began, 1)}


RANKERS = Kind(jobs_of, _row, predicted_seconds)
