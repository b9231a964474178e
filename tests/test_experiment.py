"""An experiment is one command: every cell a row, stopped and gone on with, failures among them, nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli.experiment import app
from retrieval.data.read import read_dataset
from retrieval.learn.experiment import jobs_of, pending, run_experiment
from retrieval.learn.grid import JUDGED_BY, Experiment, ExperimentError, Run
from retrieval.learn.results import markdown, read_rows, write_rows
from retrieval.learn.settings import plan_of

SMALL = {"hidden": 32, "layers": 1, "vocabulary": 400, "targets": 24, "random_items": 16, "numbers": "log"}


def quiet(_number: int, _of: int, _run: Run) -> Callable[[str, int, int], None]:
    return lambda _stage, _done, _total: None


def written(folder: Path, data: Path, **changes: Any) -> Path:
    content = {
        "name": "tiny",
        "out": str(folder / "results"),
        "data": {"shop": str(data)},
        "seeds": [1],
        "steps": 2,
        "base": SMALL,
        "factors": {"numbers": ["log", "none"], "counts": ["frozen"]},
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({name: held for name, held in content.items() if held is not None}, sort_keys=False))
    return path


def test_cells_are_one_factor_at_a_time_or_the_product(tmp_path: Path) -> None:
    factors = {"loss": ["infonce", "bce"], "size": {"small": {"hidden": 32}, "deep": {"hidden": 32, "layers": 4}}}
    one = Experiment.read(written(tmp_path, tmp_path, factors=factors, seeds=[1, 2]))
    assert [cell[:2] for cell in one.cells()] == [
        ("base", ""), ("loss", "infonce"), ("loss", "bce"), ("size", "small"), ("size", "deep"),
    ]  # fmt: skip
    runs = list(one.runs())
    assert len(runs) == 10 and runs[2].settings["loss"] == "bce" and runs[4].settings["layers"] == 4
    assert [run.seed for run in runs] == [1] * 5 + [2] * 5
    both = Experiment.read(written(tmp_path, tmp_path, factors=factors, design="product"))
    assert [cell[1] for cell in both.cells()] == ["infonce, small", "infonce, deep", "bce, small", "bce, deep"]
    assert both.cells()[3][2] == {"loss": "bce", "hidden": 32, "layers": 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": None}, "one of steps and minutes"),
        ({"seeds": []}, "no seeds or no data"),
        ({"seeds": "all"}, "seeds: Input should be a valid list"),
        ({"colour": 3}, "colour: "),
        ({"design": "random"}, "design: Input should be 'one_factor' or 'product'"),
    ],
)
def test_a_file_that_is_no_experiment_is_one_clear_error(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=said):
        Experiment.read(written(tmp_path, tmp_path, **changes))


def test_text_that_is_no_yaml_and_settings_that_are_none_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.yaml").write_text("a: [1")
    with pytest.raises(ExperimentError, match="cannot be read as YAML"):
        Experiment.read(tmp_path / "torn.yaml")
    twice = written(tmp_path, tiny_folder)
    twice.write_text(twice.read_text() + "seeds: [9]\n")
    with pytest.raises(ExperimentError, match="'seeds' stands twice"):
        Experiment.read(twice)
    for factors, said in (({"lose": ["bce"]}, "unknown settings lose"), ({"counts": ["cold"]}, "expected live or frozen")):
        experiment = Experiment.read(written(tmp_path, tiny_folder, factors=factors))
        with pytest.raises(BrewlineError, match=said):
            jobs_of(experiment, {"shop": read_dataset(tiny_folder)})


def test_rows_are_kept_gone_on_with_and_failures_are_rows(tiny_folder: Path, tmp_path: Path) -> None:
    factors = {
        "numbers": ["log", "none"],
        "counts": ["frozen"],
        "dims": [8],
        "history": ["full"],
        "base": ["no/such/checkpoint"],
    }
    experiment = Experiment.read(written(tmp_path, tiny_folder, factors=factors))
    jobs = jobs_of(experiment, {"shop": read_dataset(tiny_folder)})
    assert jobs[0].digest == jobs[1].digest, "the default's own value is the default"
    assert jobs[0].model == jobs[3].model == jobs[4].model, "what is only judged otherwise is not trained again"
    found = run_experiment(experiment, quiet)
    assert found == {"before": 0, "done": 5, "failed": 1}
    rows = read_rows(experiment.out)
    assert len(list((experiment.out / "models").iterdir())) == 4 and len(rows) == 6
    failed = rows[jobs[-1].digest]
    assert failed["status"] == "failed" and failed["reason"].startswith("TokenizerError: no/such/checkpoint")
    done = rows[jobs[0].digest]
    assert 0 <= done["recall@10 low"] <= done["recall@10"] <= done["recall@10 high"] <= 1 and done["steps"] == 2
    assert rows[jobs[3].digest]["train_seconds"] == 0 and rows[jobs[4].digest]["dims"] == 8
    assert (experiment.out / "judged" / done["digest"] / "ranked.parquet").is_file()
    assert run_experiment(experiment, quiet) == {"before": 6, "done": 0, "failed": 0}
    assert pq.read_table(experiment.out / "results.parquet").num_rows == 6
    assert [job.digest for job in pending(jobs, rows, retry=True)] == [failed["digest"]]
    table = (experiment.out / "results.md").read_text()
    assert table.count(f"| {done['recall@10']:.4f}") >= 2 and "TokenizerError" in table
    lines = {
        line.split("|")[1].strip() + line.split("|")[2].strip(): line.split("|")[10].strip(" *")
        for line in table.splitlines()
        if line[:2] == "| "
    }
    changed = rows[jobs[2].digest]["recall@100"] - done["recall@100"]
    assert lines["factorvalue"] == "recall@100 minus default" and lines["base"] == lines["baseno/such/checkpoint"] == ""
    assert lines["numberslog"] == "+0.0000 ± 0.0000" and lines["numbersnone"].startswith(f"{changed:+.4f} ± ")


def test_a_stopped_experiment_goes_on_and_shows_empty_cells(tiny_folder: Path, tmp_path: Path) -> None:
    experiment = Experiment.read(written(tmp_path, tiny_folder))

    def stopped(number: int, _of: int, _run: Run) -> Callable[[str, int, int], None]:
        if number == 2:
            raise KeyboardInterrupt
        return lambda _stage, _done, _total: None

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, stopped)
    assert "| numbers | none | 0 |  |" in (experiment.out / "results.md").read_text()
    jobs = jobs_of(experiment, {"shop": read_dataset(tiny_folder)})
    first = read_rows(experiment.out)[jobs[0].digest]
    assert run_experiment(experiment, quiet) == {"before": 1, "done": 2, "failed": 0}
    assert read_rows(experiment.out)[jobs[0].digest] == first


def test_the_command_prints_a_plan_without_running_and_then_runs(tiny_folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_folder, factors={"counts": ["frozen"]})
    planned = CliRunner().invoke(app, [str(path), "--dry-run", "--json"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert [run["from"] for run in plan["runs"]] == ["arithmetic", "trained already"] and plan["there"] == 0
    assert not (tmp_path / "results").exists()
    ran = CliRunner().invoke(app, [str(path), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout) == {"before": 0, "done": 2, "failed": 0, "results": str(tmp_path / "results" / "results.md")}
    again = json.loads(CliRunner().invoke(app, [str(path), "--dry-run", "--json"]).stdout)
    assert again == {"runs": [], "there": 2, "seconds": 0}


def test_no_text_leaves_its_cell(tmp_path: Path) -> None:
    experiment = Experiment.read(written(tmp_path, tmp_path, factors={"loss": ["a|b"]}))
    experiment.out.mkdir()
    run = list(experiment.runs())[1]
    row = {"digest": "x", "status": "failed", "reason": "line\none | two", "train_seconds": None}
    write_rows(experiment, [(run, "x")], {"x": row})
    line = next(line for line in (experiment.out / "results.md").read_text().splitlines() if "a/b" in line)
    assert line.endswith("| line one / two |") and read_rows(experiment.out) == {"x": row}


def test_the_example_says_what_it_costs_and_every_cell_is_a_plan() -> None:
    experiment = Experiment.read(Path(__file__).parent.parent / "benchmarks" / "evidence.yaml")
    runs = list(experiment.runs())
    plans = {str(plan_of({key: held for key, held in run.settings.items() if key not in JUDGED_BY})) for run in runs}
    assert len(runs) == 2 * 3 * 28 and len(plans) == 3 * 23, "its comment counts them"


def test_a_mean_over_seeds_has_both_kinds_of_noise(tmp_path: Path) -> None:
    experiment = Experiment.read(written(tmp_path, tmp_path, factors={}, seeds=[1, 2]))
    cells = [(run, str(run.seed)) for run in experiment.runs()]
    row = {"status": "done", "train_seconds": 60.0, "reason": ""}
    rows = {
        "1": {**row, "recall@10": 0.2, "recall@10 low": 0.19, "recall@10 high": 0.21},
        "2": {**row, "recall@10": 0.24, "recall@10 low": 0.23, "recall@10 high": 0.25},
    }
    half = 1.96 * np.sqrt((0.01 / 1.96) ** 2 + 0.0008 / 2)
    assert f"| base |  | 2 | 0.2200 ± {half:.4f} |" in markdown(experiment, cells, rows)
