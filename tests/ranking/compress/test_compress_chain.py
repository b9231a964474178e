"""Plans become complete ranker folders, gates stop them, and a kill changes no byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ranking.learn.chain import Chain
from ranking.learn.compress import RESULTS, TABLE, GateFailed, alone, compress, planned, refuse_if_stopped
from ranking.learn.compress_plan import CompressPlan, PlanError, configs_of, facts_of
from ranking.learn.prune import PruneError, weights_of
from ranking.learn.quantize import QuantizeError
from ranking.learn.questions import Ground, ground_of
from ranking.prompts import RankPrompts
from ranking.ranker import FINGERPRINTED, Ranker
from ranking.shots import Shot
from retrieval.data.schema import Dataset
from retrieval.learn.checkpoint import TrainingError
from retrieval.llama import CheckpointError, Size, new_config

OPEN = {"auc": None, "gauc": None, "ndcg": None, "ne": None, "ece": None}
SHAPE = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32}


def cut(steps: int = 4, **more: object) -> dict[str, object]:
    return {"name": "cut", "kind": "prune", "keep": {"mlp": 72}, "learn": {"steps": steps, **more}, "batches": 4}


def distill(name: str = "small", steps: int = 4) -> dict[str, object]:
    return {"name": name, "kind": "distill", "size": SHAPE, "learn": {"steps": steps}}


INT8 = {"name": "int8", "kind": "quantize", "to": "int8"}


def silent(_stage: str, _done: int, _total: int) -> None:
    """Hears progress and says nothing."""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FINGERPRINTED}


class Killed(Exception):
    """The process ended here."""


def test_a_chain_leaves_servable_folders_and_goes_on_to_the_same_bytes_after_a_kill(write_plan: Any, teacher: Ranker) -> None:
    routes = {"bits": [INT8], "down": [cut(checkpoint_seconds=0)], "new": [{**distill(), "kind": "scratch"}]}
    gates = {**OPEN, "kendall": 0.85, "overlap": 0.9, "judged_by": "value"}
    more = {"gates": gates, "ungated": ["down", "new"], "compare": [["down", "new"]]}
    whole, killed = (CompressPlan.read(write_plan(routes, out, **more)) for out in ("whole", "killed"))

    def kill(stage: str, done: int, _total: int) -> None:
        if "cut" in stage and done == 3:
            raise Killed

    with pytest.raises(Killed):
        compress(killed, kill)
    heard: list[tuple[str, int]] = []
    again = compress(killed, lambda stage, done, _total: heard.append((stage, done)))
    assert [done for stage, done in heard if "cut" in stage] == [3, 4]
    found = compress(whole, silent)
    for step in ("bits/seed-1/1-int8", "down/seed-1/1-cut", "new/seed-1/1-small"):
        assert bytes_of(whole.out / step) == bytes_of(killed.out / step), step
        ranker = Ranker.load(whole.out / step)
        assert ranker.facts.calibrators["label"].n == found["held_candidates"]
        assert ranker.head is not None and teacher.head is not None and ranker.head.text != teacher.head.text
        assert ranker.head.trees.facts() == teacher.head.trees.facts()
        assert not (killed.out / step / "compress" / "checkpoint").exists()
    assert {row["fingerprint"] for row in found["rows"]} == {row["fingerprint"] for row in again["rows"]}
    check_results(whole, found)


def check_results(plan: CompressPlan, found: dict[str, Any]) -> None:
    """The table has every model; the int8 step passed the gate against its parent with its scores changed."""
    rows = {row["step"]: row for row in found["rows"]}
    assert list(rows) == ["teacher", "int8", "cut", "small"] and not found["stopped"]
    assert rows["teacher"]["auc_lost"] == 0 and rows["cut"]["outside_embeddings"] < rows["teacher"]["outside_embeddings"]
    kendall = next(line for line in rows["int8"]["gate"] if line["metric"] == "kendall")
    assert kendall["passed"] and 0.85 <= kendall["lost"] <= 1 and not rows["small"]["gate"]
    (side,) = found["comparisons"]
    assert side["low"] < side["difference"] < side["high"]
    assert side["difference"] == pytest.approx(rows["cut"]["auc"] - rows["small"]["auc"])
    assert json.loads((plan.out / RESULTS).read_text())["rows"] == json.loads(json.dumps(found["rows"]))
    table = (plan.out / TABLE).read_text()
    assert all(f"| {name} |" in table for name in ("teacher", "bits: int8", "down: cut", "new: small"))
    assert rows["cut"]["items_per_second"] > 0 and all(row["head"] for row in found["head"])


def test_a_failing_gate_stops_the_route_and_leaves_the_table(write_plan: Any) -> None:
    gates = {**OPEN, "kendall": 0.999, "judged_by": "value"}
    path = write_plan({"down": [cut(1), INT8], "other": [distill(steps=1)]}, gates=gates, ungated=["other"])
    result = CliRunner().invoke(app(), ["compress", str(path), "--json"])
    assert isinstance(result.exception, GateFailed)
    printed = json.loads(result.stdout)
    plan = CompressPlan.read(path)
    assert list(printed["stopped"]) == ["down, seed 1, cut"] and "kendall" in printed["stopped"]["down, seed 1, cut"]
    assert not (plan.out / "down" / "seed-1" / "2-int8").exists()
    assert (plan.out / "other" / "seed-1" / "1-small" / "ranker.json").is_file()
    assert "failed 1 of 1" in (plan.out / TABLE).read_text() and "## Stopped" in (plan.out / TABLE).read_text()
    again = CompressPlan.read(write_plan({"down": [cut(1), INT8]}, gates={**gates, "kendall": 0.0}))
    found = compress(again, lambda stage, _done, _total: pytest.fail(f"trained again: {stage}"))
    refuse_if_stopped(found, again)
    assert [row["step"] for row in found["rows"]] == ["teacher", "cut", "int8"]


def test_a_folder_of_another_step_is_refused(write_plan: Any) -> None:
    plan = CompressPlan.read(write_plan({"down": [INT8]}, gates=OPEN))
    compress(plan, silent)
    other = CompressPlan.read(write_plan({"down": [{**INT8, "to": "bfloat16"}]}, gates=OPEN))
    with pytest.raises(TrainingError, match=r"step\.to"):
        compress(other, silent)
    shutil.rmtree(plan.out / "down" / "seed-1" / "1-int8")
    compress(other, silent)


def test_steps_of_before_are_known_and_other_examples_make_another_step(
    write_plan: Any, tiny_dataset: Dataset, ground: Ground, teacher: Ranker
) -> None:
    plan = CompressPlan.read(write_plan({"down": [cut(), {**cut(), "name": "thin", "keep": {"hidden": 24}}]}))
    first, second = (facts_of(step)["keep"] for step in plan.routes["down"])
    assert first == {"mlp": 72, "kv_heads": None, "layers": None}, "what a folder made before there was a hidden size names"
    assert second == {**first, "mlp": None, "hidden": 24}
    chain = Chain(plan, tiny_dataset, ground, teacher, silent)
    root = chain.root()
    assert chain.root().record == root.record and "shots" not in root.record["identity"]
    shown = RankPrompts(
        teacher.prompts.tokens, teacher.prompts.quantizer, teacher.prompts.budgets, shots={"label": (Shot("a", "b", True),) * 4}
    )
    asking = Ranker(shown, teacher.facts, teacher.fingerprint, teacher.engine)
    other = replace(ground, shots=ground_of(tiny_dataset, asking, 2_000).shots)
    with pytest.raises(TrainingError, match="shots was 'absent', is 4"):
        Chain(plan, tiny_dataset, other, teacher, silent).root()


def test_the_onnxruntime_engine_has_a_gate_of_its_own(write_plan: Any) -> None:
    plan = CompressPlan.read(write_plan({"down": [{**INT8, "onnx": True}]}, gates=OPEN))
    found = compress(plan, silent)
    (row,) = (row for row in found["rows"] if row["step"] == "int8")
    if row["onnx"]["refused"]:
        assert "is not admitted" in row["onnx"]["refused"] and list(found["stopped"]) == ["down, seed 1, int8"]
    else:
        assert abs(row["onnx"]["auc"] - row["auc"]) < 0.05 and not found["stopped"]
        assert any(line["metric"] == "kendall, onnxruntime" for line in row["gate"])


def test_the_dry_run_reads_no_data_and_says_what_is_there(write_plan: Any, teacher_folder: Path) -> None:
    path = write_plan({"down": [cut(), INT8], "new": [distill()]}, seeds=[1, 2])
    result = CliRunner().invoke(app(), ["compress", str(path), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    steps = json.loads(result.stdout)["steps"]
    assert [(one["route"], one["step"], one["learns"], one["there"]) for one in steps] == [
        ("down", "cut", 4, 0),
        ("down", "int8", 0, 0),
        ("new", "small", 4, 0),
    ]
    held = Ranker.load(teacher_folder).engine.model.config
    assert steps[0]["parameters"] == steps[1]["parameters"] > steps[2]["parameters"] > held.vocab_size * 16
    assert not CompressPlan.read(path).out.exists()


@pytest.mark.parametrize(
    ("routes", "more", "said"),
    [
        ({"a": [{**INT8, "too": 8}]}, {}, "too"),
        ({"a": [{**INT8, "kind": "shrink"}]}, {}, "kind|tag"),
        ({"a": [INT8]}, {"budgets": 3}, "budgets"),
        ({"a": [INT8]}, {"gates": {"acu": 1}}, "acu"),
        ({"a": [{**distill(), "learn": {"stepps": 3}}]}, {}, "stepps"),
        ({"a": [{**distill(), "size": {**SHAPE, "hiden": 3}}]}, {}, "hiden"),
        ({"a": [{**distill(), "base": "x"}]}, {}, "one of size and base"),
        ({"a": [distill()], "b": [cut(3)]}, {"budget": 4}, "route 'b' trains 3 steps"),
        ({"a": [INT8, INT8]}, {}, "names must differ"),
        ({"a": [{**INT8, "name": "../x"}]}, {}, "letters"),
        ({"a": [INT8]}, {"compare": [["a", "b"]]}, "unknown routes b"),
        ({}, {}, "nothing to do"),
        ({"a": [INT8]}, {"taught": 0}, "nothing to do"),
    ],
)
def test_a_plan_that_cannot_be_names_what_is_wrong(write_plan: Any, routes: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        CompressPlan.read(write_plan(routes, **more))


def test_heads_that_rotary_positions_cannot_turn_are_refused_before_anything_runs(write_plan: Any) -> None:
    plan = CompressPlan.read(write_plan({"odd": [{**distill(), "size": {**SHAPE, "hidden": 18, "heads": 2, "kv_heads": 1}}]}))
    with pytest.raises(CheckpointError, match="twice the heads"):
        planned(plan)


def test_a_cut_that_is_too_deep_is_refused_before_anything_runs(write_plan: Any) -> None:
    deep: dict[str, Any] = {**cut(), "keep": {"mlp": 8}}
    plan = CompressPlan.read(write_plan({"first": [distill()], "deep": [deep]}))
    for run in (planned, lambda each: compress(each, silent)):
        with pytest.raises(PruneError, match="at most 30%"):
            run(plan)
    assert not (plan.out / "first").exists()
    planned(CompressPlan.read(write_plan({"deep": [{**deep, "one_shot": True}]})))


def test_a_checkpoint_is_a_start_for_a_student(write_plan: Any, teacher_folder: Path) -> None:
    same = {"name": "same", "kind": "distill", "base": str(teacher_folder), "learn": {"steps": 1, "learning_rate": 1e-6}}
    plan = CompressPlan.read(write_plan({"as": [same]}, gates={**OPEN, "kendall": 0.99, "judged_by": "value"}))
    found = compress(plan, silent)
    assert not found["stopped"] and abs(found["rows"][1]["auc_lost"]) < 0.01
    wrong = CompressPlan.read(write_plan({"as": [{**same, "base": str(plan.out)}]}))
    with pytest.raises(PlanError, match="no LLaMA checkpoint"):
        planned(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_fp8_is_refused_before_anything_runs(write_plan: Any) -> None:
    plan = CompressPlan.read(write_plan({"first": [distill()], "bits": [{**INT8, "to": "fp8"}]}))
    with pytest.raises(QuantizeError, match="needs a CUDA GPU"):
        compress(plan, silent)
    assert not (plan.out / "first").exists()


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(PlanError, match="another process"), alone(tmp_path):
        pass


def app() -> Any:
    from ranking.cli.ranker import app

    return app


def test_the_example_plan_can_be_read_and_its_cuts_can_be_made() -> None:
    plan = CompressPlan.read(Path(__file__).parents[3] / "benchmarks" / "compress.yaml")
    teacher = new_config(Size(), 6_000)
    sizes = {route: weights_of(configs_of(steps, teacher)[-1]) for route, steps in plan.routes.items()}
    assert sizes["stepwise"] == sizes["direct"] and sizes["gradual"] == sizes["one shot"]
    assert 0.9 < sizes["from scratch"][0] / sizes["direct"][0] < 1.1  # a stock LLaMA cannot have just these widths of its heads
    assert weights_of(teacher)[0] > 4 * sizes["stepwise"][0] and set(plan.ungated) == plan.routes.keys() - {"stepwise"}
