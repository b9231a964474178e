"""The demo's chain: a plan from the teacher's own size, and the last model that passed is the one that is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli.demo_chain import STEPS, served, side_by_side, sizes_of, write_plan
from ranking.cli.ranker import app
from ranking.learn.compress import planned
from ranking.learn.compress_plan import CompressPlan, Prune, Quantize
from ranking.learn.prune import Keep, pruned_config, weights_of
from retrieval.data.schema import Dataset, Members, Meta
from retrieval.data.write import write_dataset
from retrieval.llama import Size, new_config

OPEN = {"auc": None, "gauc": None, "ndcg": None, "ne": None, "ece": None}
CUT = {"name": "pruned", "kind": "prune", "keep": {"mlp": 72}, "learn": {"steps": 2}, "batches": 4}
INT8 = {"name": "int8", "kind": "quantize", "to": "int8"}


def chain(path: Path) -> dict[str, Any]:
    """What the demo reads: the command's JSON, also when the command refuses or stops."""
    result = CliRunner().invoke(app, ["compress", str(path), "--json"])
    assert result.exception is None or isinstance(result.exception, BrewlineError), result.exc_info
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_sizes_follow_from_the_teachers() -> None:
    teacher = new_config(Size(), 6_000)
    keep, less = sizes_of(teacher.to_dict())
    student = pruned_config(teacher, Keep(**keep), most=1.0)
    pruned = pruned_config(student, Keep(**less))
    assert student.hidden_size == 64 and weights_of(teacher)[0] > 2 * weights_of(pruned)[0]
    assert weights_of(teacher)[1] == pytest.approx(4 * weights_of(pruned)[1], rel=0.02)


def test_the_plan_can_be_run_and_its_length_follows_from_the_minutes(
    teacher_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    report = {"seconds": 60.0, "steps": 60}
    short, long = (
        CompressPlan.read(write_plan(tmp_path, tiny_folder, teacher_folder, report, minutes, 3)) for minutes in (0.1, 10.0)
    )
    world = CompressPlan.read(write_plan(tmp_path, tiny_folder, teacher_folder, report, None, 3))
    assert sum(step.learn.steps for step in world.routes["small"][:2]) == STEPS, "no clock decides"  # type: ignore[union-attr]
    student, pruned, int8 = long.routes["small"]
    assert isinstance(student, Prune) and isinstance(pruned, Prune) and isinstance(int8, Quantize) and int8.onnx
    assert student.learn.steps > 10 * short.routes["small"][0].learn.steps  # type: ignore[union-attr]
    assert long.taught == student.learn.steps * student.learn.candidates and long.seeds == [3]
    assert (
        long.gates.judged_by == "better_bound"
        and None not in (long.gates.auc, long.gates.ne, long.gates.ece)
        and len(planned(long)) == 3
    )


def test_the_last_model_that_passed_in_float32_is_served(write_plan: Any, teacher_folder: Path) -> None:
    path = write_plan({"small": [CUT, {**INT8, "onnx": True}]}, gates=OPEN, taught=300)
    found = chain(path)
    (asked,) = (CompressPlan.read(path).out / "answers").glob("*/identity.json")
    read = json.loads(asked.read_text())["candidates"]
    assert 300 <= read["label"] < 324 and 0 < read["like"] < 40, "the teacher reads what students can learn from, no more"
    small = served(found, teacher_folder)
    assert small.model == "pruned" and small.folder == Path(found["rows"][1]["folder"])
    stopped = bool(found["stopped"])  # the engine of onnxruntime has a gate of its own
    assert ("stopped at int8" in small.why) == stopped and ("every gate passed" in small.why) == (not stopped)
    console = Console(record=True, width=120)
    console.print(side_by_side(small))
    shown = console.export_text()
    assert all(name in shown for name in ("teacher", "pruned (served)", "int8", "AUC", "NE", "ECE"))
    assert f"{found['rows'][1]['parameters']:,}" in shown and f"{found['rows'][1]['auc']:.4f}" in shown


def test_a_gate_that_stops_the_chain_leaves_the_teacher(write_plan: Any, teacher_folder: Path) -> None:
    found = chain(write_plan({"small": [CUT, INT8]}, gates={**OPEN, "kendall": 0.9999, "judged_by": "value"}))
    small = served(found, teacher_folder)
    assert (small.model, small.folder) == ("teacher", teacher_folder)
    assert small.why.startswith("the chain stopped at pruned: kendall") and [row["step"] for row in small.rows] == [
        "teacher",
        "pruned",
    ]


def test_data_without_answers_is_refused_before_anything_runs(
    write_plan: Any, teacher_folder: Path, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    nothing = tiny_dataset.events.take(tiny_dataset.events.timestamp < 0)
    shop = replace(tiny_dataset, events=nothing, connections=None, members=Members([]), meta=Meta("shop", 0, 0, ()))
    write_dataset(shop, tmp_path / "shop")
    path = write_plan({"small": [CUT]})
    path.write_text(path.read_text().replace(str(write_plan.data), str(tmp_path / "shop")))
    small = served(chain(path), teacher_folder)
    assert (small.model, small.folder, small.rows) == ("teacher", teacher_folder, [])
    assert "did not begin" in small.why and "0 answers of the rarer kind" in small.why
