"""Runs an experiment: trains and judges each cell, keeps one row for each, and goes on where it was stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from retrieval.data.read import read_dataset
from retrieval.data.schema import Dataset
from retrieval.encoder import FACTS, Encoder
from retrieval.evidence.encoded import EncoderModel
from retrieval.evidence.evaluate import RetrievalReport, evaluate_retrieval
from retrieval.evidence.saved import write_report
from retrieval.learn.checkpoint import dataset_digest
from retrieval.learn.fit import train_encoder
from retrieval.learn.grid import JUDGED_BY, Experiment, ExperimentError, Run
from retrieval.learn.paired import JUDGED
from retrieval.learn.results import DONE, FAILED, Row, read_rows, write_rows
from retrieval.learn.settings import plan_of
from retrieval.learn.start import EncoderPlan
from retrieval.learn.validate import VALIDATION_SHARE, Progress
from retrieval.learn.whole import WholeModel
from retrieval.provenance import check_provenance

DIGEST_LENGTH = 16

C = TypeVar("C", bound="Cell")


class Cell(Protocol):
    """A cell that can be run: `digest` of all that decides its row, `model` of all that decides its training."""

    @property
    def run(self) -> Run: ...
    @property
    def digest(self) -> str: ...
    @property
    def model(self) -> str: ...


@dataclass(frozen=True)
class Job:
    """A `Cell` of encoders."""

    run: Run
    plan: EncoderPlan
    digest: str
    model: str


@dataclass(frozen=True)
class Kind:
    """How cells of one kind are made of a file, what running one gives (`kept` makes it a row), and how long it may take."""

    jobs: Callable[[Experiment, Mapping[str, Dataset]], Sequence[Any]]
    row: Callable[[Experiment, Any, Dataset, Progress], Row]
    seconds: Callable[[Any, Experiment, Mapping[str, Row]], tuple[float, str]]


def jobs_of(experiment: Experiment, datasets: Mapping[str, Dataset]) -> list[Job]:
    """The jobs of all cells; cells that say the same share a digest. Raises TrainingError for a setting that cannot be."""
    digests = {name: dataset_digest(dataset) for name, dataset in datasets.items()}
    found = []
    for run in experiment.runs():
        judged = {name: run.settings[name] for name in JUDGED_BY}
        if judged["counts"] not in ("live", "frozen") or not (judged["dims"] is None or isinstance(judged["dims"], int)):
            raise ExperimentError(f"{run.words}: counts and dims are {judged}; expected live or frozen, and a whole number")
        plan = plan_of({name: value for name, value in run.settings.items() if name not in JUDGED_BY})
        model = digest_of({"plan": asdict(plan), "data": digests[run.data]})
        found.append(Job(run, plan, digest_of({"model": model, **judged}), model))
    return found


def run_experiment(
    experiment: Experiment, begin: Callable[[int, int, Run], Progress], *, retry: bool = False, kind: Kind | None = None
) -> dict[str, int]:
    """Runs what has no row yet and returns how many rows are done, failed and were there before.

    `begin` (number, of, run) is called before each run and gives what its stages report to. A run that fails leaves a row with
    the reason and the next one starts; `retry` runs failed ones again. Without a `kind` encoders are run.
    """
    how = kind or ENCODERS
    experiment.out.mkdir(parents=True, exist_ok=True)
    with _alone(experiment.out):
        datasets = {name: read_dataset(folder) for name, folder in experiment.data.items()}
        jobs = how.jobs(experiment, datasets)
        rows = read_rows(experiment.out)
        waiting = pending(jobs, rows, retry=retry)
        found = {"before": len({job.digest for job in jobs}) - len(waiting), DONE: 0, FAILED: 0}
        for number, job in enumerate(waiting):
            row = how.row(experiment, job, datasets[job.run.data], begin(number + 1, len(waiting), job.run))
            rows[job.digest] = row
            write_rows(experiment, [(each.run, each.digest) for each in jobs], rows)
            found[str(row["status"])] += 1
        if not waiting:
            write_rows(experiment, [(each.run, each.digest) for each in jobs], rows)
        return found


def pending(jobs: Sequence[C], rows: Mapping[str, Row], *, retry: bool) -> list[C]:
    """The jobs without a row, each digest once."""
    first = {job.digest: job for job in reversed(jobs)}
    wanted = (job for job in jobs if first[job.digest] is job)
    return [job for job in wanted if job.digest not in rows or (retry and rows[job.digest]["status"] == FAILED)]


def predicted_seconds(job: Job, experiment: Experiment, rows: Mapping[str, Row]) -> tuple[float, str]:
    """How long a job may take, and what this was taken from: rows of equal shape, the minutes asked for, or arithmetic."""
    plan = job.plan
    batch, budgets = plan.batch, plan.budgets
    items = batch.targets * (1 + batch.hard) + batch.random_items
    tokens = batch.targets / 2 * budgets.member + items * budgets.item
    passes = 8 if plan.loop.cached or plan.loop.recompute else 6
    step, share = passes * plan.size.multiplied * tokens / experiment.speed, VALIDATION_SHARE if plan.validation else 0.0
    return foretold(seconds_of_alike(job.run.data, shape_of(plan), rows), plan.minutes, plan.steps, step / (1 - share))


def foretold(alike: float | None, minutes: float | None, steps: int | None, step: float) -> tuple[float, str]:
    """Seconds and what they were taken from: rows `alike`, the `minutes` asked for, or `steps` of `step` seconds each."""
    if alike is not None:
        return alike, "rows"
    if minutes is not None and steps is None:
        return 60 * minutes, "minutes"
    return (steps or 0) * step, "arithmetic"


def seconds_of_alike(data: str, shape: str, rows: Mapping[str, Row]) -> float | None:
    """How long rows of one shape took on average; None if there are none."""
    alike = [
        float(row["train_seconds"]) + float(row["evaluate_seconds"])
        for row in rows.values()
        if row["status"] == DONE and row["data"] == data and row["shape"] == shape and row["train_seconds"]
    ]
    return sum(alike) / len(alike) if alike else None


def shape_of(plan: EncoderPlan) -> str:
    """What decides how long a training takes."""
    parts = [asdict(part) for part in (plan.size, plan.budgets, plan.batch)]
    return digest_of([*parts, plan.steps, plan.minutes, plan.clock, plan.validation, plan.base, plan.device])


def _row(experiment: Experiment, job: Job, dataset: Dataset, progress: Progress) -> Row:
    return kept(
        job,
        shape_of(job.plan),
        lambda: {**_trained(experiment, job, dataset, progress), **_judged(experiment, job, dataset, progress)},
    )


def kept(job: Cell, shape: str, work: Callable[[], Row]) -> Row:
    """The row of a cell: what `work` found, or why it failed."""
    run = job.run
    row: Row = {"digest": job.digest, "model": job.model, "data": run.data, "factor": run.factor, "value": run.value}
    row |= {"seed": run.seed, **{name: run.settings[name] for name in JUDGED_BY}, "shape": shape}
    row |= {"settings": json.dumps(dict(run.settings), sort_keys=True), "status": DONE, "reason": ""}
    try:
        return {**row, **work()}
    except Exception as error:  # whatever it was, it is this cell's result, and other cells are still to come
        return {**row, "status": FAILED, "reason": " ".join(f"{type(error).__name__}: {error}".split())}


def _trained(experiment: Experiment, job: Job, dataset: Dataset, progress: Progress) -> Row:
    """Trains unless the folder is complete, as it is for a cell that is only judged in another way."""
    folder = experiment.out / "models" / job.model
    path = folder / "training" / "report.json"
    if (folder / FACTS).is_file() and path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        seconds = 0.0
    else:
        (folder / FACTS).unlink(missing_ok=True)  # a kill between the two files leaves a folder that could never be judged
        report = asdict(train_encoder(dataset, folder, job.plan, progress))
        seconds = report["seconds"]
    kept = {name: report[name] for name in ("steps", "learning_rate", "parameters", "fingerprint", "note")}
    return {**kept, "train_seconds": seconds}


def _judged(experiment: Experiment, job: Job, dataset: Dataset, progress: Progress) -> Row:
    """Judges as `brewline evaluate retrieval` does, without baselines, and leaves the same files for paired tests."""
    began, settings = time.monotonic(), job.run.settings
    folder = experiment.out / "models" / job.model
    encoder = Encoder.load(folder, job.plan.device, whole_log=True)
    check_provenance(folder, encoder.facts.get("training", {}), dataset)
    encoder = encoder if settings["dims"] is None else encoder.truncated(settings["dims"])
    model: EncoderModel = (WholeModel if encoder.writer.whole else EncoderModel)(
        encoder, dataset, settings["counts"], dataset.meta.cut_test
    )
    tell = lambda done, total: progress("evaluate", done, total)  # noqa: E731 - a name for one argument
    report = evaluate_retrieval(dataset, model, settings["counts"], [], progress=tell)
    write_report(report, dataset, experiment.out / JUDGED / job.digest)
    return {**_numbers(report), "evaluate_seconds": round(time.monotonic() - began, 1)}


def _numbers(report: RetrievalReport) -> Row:
    assert report.model is not None
    found: Row = {"members": len(report.queries)}
    for name, estimate in report.model.quality.metrics.items():
        facts = estimate.as_dict()
        found |= {name: facts["value"], f"{name} low": facts["low"], f"{name} high": facts["high"]}
    cold = report.model.quality.slices["cold targets"]
    found |= {f"cold {name}": value for name, value in cold.items()}
    similarity = report.similarity
    return {**found, "popularity correlation": None if similarity is None else similarity.pearson}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a results folder: of two that append, one would lose rows."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExperimentError(
                f"{folder}: another process runs an experiment here; wait for it or choose another out"
            ) from error
        yield


def digest_of(content: Any) -> str:
    """Hex digits that differ if the content does."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]


ENCODERS = Kind(jobs_of, _row, predicted_seconds)
