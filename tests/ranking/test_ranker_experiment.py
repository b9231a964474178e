"""`kind: ranker` in an experiment file: each cell trains and judges a ranker, with the rows and stops of the encoders' grids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli.experiment import app
from ranking.learn.experiment import RANKERS, jobs_of, predicted_seconds
from ranking.learn.settings import plan_of
from ranking.ranker import Ranker
from retrieval.data.read import read_dataset
from retrieval.learn.experiment import run_experiment
from retrieval.learn.grid import JUDGED_BY, Experiment
from retrieval.learn.results import read_rows

SMALL = {
    "size.hidden": 16, "size.layers": 1, "size.heads": 2, "size.kv_heads": 1, "size.mlp": 32, "size.vocabulary": 300,
    "budgets.item": 24, "budgets.prefix": 48, "loop.candidates": 24, "fusion": False, "learning_rate": 0.005,
}  # fmt: skip


def written(folder: Path, data: Path, **changes: Any) -> Path:
    content = {
        "name": "tiny", "kind": "ranker", "out": str(folder / "results"), "data": {"shop": str(data)}, "seeds": [1], "steps": 2,
        "base": SMALL, "factors": {"share": [0.2], "counts": ["frozen"], "base": ["no/such/checkpoint"]}, **changes,
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_cells_of_rankers_are_trained_judged_kept_and_gone_on_with(tiny_folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_folder)
    planned = json.loads(CliRunner().invoke(app, [str(path), "--dry-run", "--json"]).stdout)
    assert [run["from"] for run in planned["runs"]] == ["arithmetic", "arithmetic", "trained already", "arithmetic"]
    ran = CliRunner().invoke(app, [str(path), "--json"])
    assert ran.exit_code == 0, ran.output
    assert {name: json.loads(ran.stdout)[name] for name in ("before", "done", "failed")} == {"before": 0, "done": 3, "failed": 1}
    experiment = Experiment.read(path)
    rows = read_rows(experiment.out)
    jobs = jobs_of(experiment, {"shop": read_dataset(tiny_folder)})
    whole, some, frozen, broken = (rows[job.digest] for job in jobs)
    assert broken["status"] == "failed" and "no/such/checkpoint" in broken["reason"]
    for row in (whole, some, frozen):
        assert 0 <= row["auc low"] <= row["auc"] <= row["auc high"] <= 1 and row["text auc"] == row["auc"], "no head, words alone"
        scores = pq.read_table(experiment.out / "judged" / row["digest"] / "scores.parquet")
        assert scores.column_names == ["event_id", "score", "score_text"] and scores.num_rows == row["events"]
    assert frozen["train_seconds"] == 0 and frozen["model"] == whole["model"], "what is judged otherwise is not trained again"
    facts = [Ranker.load(experiment.out / "models" / row["model"]).facts.training for row in (whole, some)]
    assert "share" not in facts[0] and facts[1]["share"] == 0.2 and "share" not in facts[1]["settings"]
    table = (experiment.out / "results.md").read_text()
    assert f"| {whole['auc']:.4f}" in table and "calibration_error_debiased" in table and "recall@10" not in table
    again = run_experiment(experiment, lambda *_: lambda *_: None, kind=RANKERS)
    assert again == {"before": 4, "done": 0, "failed": 0}
    assert predicted_seconds(jobs[0], experiment, rows)[1] == "rows"
    (experiment.out / "models" / whole["model"] / "training" / "report.json").unlink()  # as if killed just before it was written
    (experiment.out / "results.parquet").unlink()
    assert run_experiment(experiment, lambda *_: lambda *_: None, kind=RANKERS) == {"before": 0, "done": 3, "failed": 1}
    assert read_rows(experiment.out)[whole["digest"]]["fingerprint"] == whole["fingerprint"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factors": {"size.width": [3]}}, "unknown settings size.width"),
        ({"factors": {"counts": ["cold"]}}, "expected live or frozen"),
        ({"factors": {"dims": [8]}}, "no dims for a ranker"),
        ({"factors": {"budgets.prefix": ["long"]}}, "settings: budgets.prefix"),
        ({"base": {"share": 0}}, "share is 0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes: dict[str, Any], said: str, tiny_folder: Path, tmp_path: Path) -> None:
    experiment = Experiment.read(written(tmp_path, tiny_folder, **changes))
    with pytest.raises(BrewlineError, match=said):
        jobs_of(experiment, {"shop": read_dataset(tiny_folder)})


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0}, {"minutes": float("nan")}, {"minutes": -1}, {"learning_rate": -0.1}, {"loop.learning_rate": float("inf")},
        {"seed": -1}, {"positions.ridge": 0}, {"loop.candidates": 0}, {"loop.temperature": 0}, {"loop.others": -0.5},
    ],
)  # fmt: skip
def test_a_number_that_no_training_can_have_is_refused(settings: dict[str, Any]) -> None:
    length = {} if {"steps", "minutes"} & settings.keys() else {"steps": 1}
    with pytest.raises(BrewlineError, match=f"settings: {next(iter(settings))} is .*; expected"):
        plan_of({**length, **settings})


@pytest.mark.parametrize("changes", [{"steps": 0}, {"steps": None, "minutes": float("nan")}, {"speed": 0}])
def test_a_length_or_speed_that_cannot_be_is_refused_with_the_file(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BrewlineError, match=r"tiny.yaml: \w+ is \w+; expected a number above 0"):
        Experiment.read(written(tmp_path, tmp_path, **changes))


def test_every_cell_of_the_example_is_a_plan() -> None:
    experiment = Experiment.read(Path(__file__).parents[2] / "benchmarks" / "ranker_scaling.yaml")
    runs = list(experiment.runs())
    plans = {str(plan_of({name: held for name, held in run.settings.items() if name not in JUDGED_BY})) for run in runs}
    assert len(runs) == len(plans) == 3 * 15, "its comment counts them"
    assert {run.factor for run in runs} == {"base", "share", "size", "budgets.prefix", "steps", "positions"}
