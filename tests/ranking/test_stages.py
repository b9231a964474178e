"""Stages of one plan: each a complete ranker, asked the same suite, stopped by its own gate, and the same after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli.ranker import app
from ranking.learn.compress import GateFailed
from ranking.learn.compress_plan import PlanError
from ranking.learn.stages import planned, refuse_if_stopped, run_stages
from ranking.learn.stages_plan import StagesPlan
from ranking.learn.stages_train import preference, text_loss
from ranking.ranker import FINGERPRINTED, Ranker
from retrieval.data.schema import Dataset
from retrieval.data.write import write_dataset
from retrieval.fingerprint import FingerprintMismatch
from retrieval.llama import Size, new_llama

TASKS = """
tasks:
  - {name: label, instruction: predict the label, question: is it liked, paraphrases: [{instruction: guess, question: liked}]}
  - {name: hide, instruction: predict what is hidden, question: is it hidden, action: hide, held_out: true}
"""
START = {
    "size.hidden": 32, "size.layers": 1, "size.heads": 2, "size.kv_heads": 1, "size.mlp": 64, "size.vocabulary": 400,
    "budgets.item": 32, "budgets.prefix": 96,
}  # fmt: skip
NAN = float("nan")
FAST = {"learning_rate": 0.005, "candidates": 48, "temperature": 1.0}
STAGES: list[dict[str, Any]] = [
    {"kind": "text", "name": "read", "steps": 12, "learning_rate": 0.005, "tokens": 400, "gate": {"most": {"text_loss": 9.0}}},
    {"kind": "tasks", "name": "tasks", "steps": 30, **FAST, "gate": {"least": {"auc": 0.55}}},
    {"kind": "instructions", "name": "words", "steps": 6, **FAST, "wishes": 0.5},
    {"kind": "align", "name": "align", "steps": 6, **FAST, "gate": {"lost": {"auc": 0.2, "judged_by": "value"}}},
]


@pytest.fixture(scope="module")
def shop(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shop on two surfaces: every tenth request is a mail."""
    log = tiny_dataset.events
    surface = (log.request % 10 == 0).astype(np.int16)
    folder = tmp_path_factory.mktemp("stages") / "data"
    write_dataset(replace(tiny_dataset, events=replace(log, surface=surface, surfaces=("feed", "mail"))), folder)
    return folder


def written(folder: Path, data: Path, out: str, stages: list[dict[str, Any]], **more: Any) -> Path:
    (folder / "tasks.yaml").write_text(TASKS)
    places = {"data": str(data), "out": str(folder / out), "tasks": str(folder / "tasks.yaml")}
    asked = {"unseen": f"{folder / 'tasks.yaml'}#hide", "surface": "mail", "lists": 6, "judged": 300}
    content = {"name": "tiny", **places, **asked, "seed": 2, "start": START, "stages": stages, **more}
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


class Killed(Exception):
    """The process ended here."""


def test_four_stages_leave_rankers_and_go_on_to_the_same_bytes_after_a_kill(shop: Path, tmp_path: Path) -> None:
    slow = [{**stage, "checkpoint_seconds": 0} for stage in STAGES]
    whole, killed = (StagesPlan.read(written(tmp_path, shop, out, slow)) for out in ("whole", "killed"))

    def kill(stage: str, done: int, _total: int) -> None:
        if stage in ("read", "align") and done == 4 and not (killed.out / f"{stage}.killed").exists():
            (killed.out / f"{stage}.killed").touch()
            raise Killed

    found = run_stages(whole, lambda _stage, _done, _total: None)
    for _ in range(2):
        with pytest.raises(Killed):
            run_stages(killed, kill)
    again = run_stages(killed, kill)
    assert [row["stage"] for row in found["rows"]] == ["0-start", "1-read", "2-tasks", "3-words", "4-align"]
    assert not found["stopped"] and (whole.out / "results.md").read_text().count("| passed |") == 5
    for row, other in zip(found["rows"], again["rows"]):
        assert row["fingerprint"] == other["fingerprint"] and row["suite"] == other["suite"]
        for name in FINGERPRINTED:
            assert (whole.out / row["stage"] / name).read_bytes() == (killed.out / row["stage"] / name).read_bytes()
    check_suite([row["suite"] for row in found["rows"]])
    last = Ranker.load(whole.out / "4-align")
    assert [one["kind"] for one in last.facts.training["stages"]] == ["text", "tasks", "instructions", "align"]
    assert last.facts.calibrators["label"].n == found["held_candidates"] and last.facts.training["positions"]["curve"]
    assert list(last.tasks) == ["label", "hide"] and [row["there"] for row in planned(whole)] == [True] * 4
    assert {check["metric"] for check in found["rows"][4]["gate"]} >= {"auc", "ece", "kendall"}


def check_suite(suites: list[dict[str, float]]) -> None:
    """Reading lowers the surprise of texts, tasks teach order and form, and every question was asked after every stage."""
    start, read, tasks, words, _ = suites
    assert all(set(suite) == set(start) for suite in suites)
    assert set(start) >= {"auc", "paraphrase_auc", "unseen_auc", "surface_auc", "format", "text_loss", "contradiction_right"}
    assert read["text_loss"] < start["text_loss"] - 0.3
    assert tasks["auc"] > max(0.55, read["auc"]) and tasks["surface_auc"] > 0.5
    assert all(0 <= suite["format"] <= 1 for suite in suites) and tasks["format"] != read["format"]
    assert words["paraphrase_auc"] != tasks["paraphrase_auc"]


def test_a_stage_goes_on_from_what_the_one_before_knew_of_places(shop: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(TASKS)
    still = {"steps": 1, "learning_rate": 1e-12}
    stages = [{**STAGES[1], "steps": 10, "gate": {}}, {**STAGES[3], "name": "held", **still, "gate": {}}, {**STAGES[0], **still}]
    stages[2]["gate"] = {}
    plan = StagesPlan.read(written(tmp_path, shop, "places", stages, unseen=f"{other}#hide"))
    found = run_stages(plan, lambda _stage, _done, _total: None)
    tasks, held, read = (Ranker.load(plan.out / row["stage"]).facts for row in found["rows"][1:])
    curve = tasks.training["positions"]["curve"]
    assert any(row["logit"] for row in curve) and {row["surface"] for row in curve} == {"feed"}, "no stage learns from mails"
    assert held.training["positions"]["curve"] == curve == read.training["positions"]["curve"]
    assert tasks.calibrators == held.calibrators == read.calibrators, "of the same weights, and all at the mean place"
    other.write_text(TASKS.replace("is it hidden", "was it put away"))
    with pytest.raises(BrewlineError, match=r"unseen.question was 'is it hidden', is 'was it put away'"):
        run_stages(plan, lambda _stage, _done, _total: None)
    other.write_text(TASKS)
    with (plan.out / "3-read" / "ranker.json").open("a") as file:
        file.write(" ")
    with pytest.raises(FingerprintMismatch):
        run_stages(replace(plan, stages=[*plan.stages, replace(plan.stages[0], name="more")]), lambda _stage, _done, _total: None)


def test_a_stage_that_does_not_pass_ends_the_plan(shop: Path, tmp_path: Path) -> None:
    stages = [{**STAGES[0], "steps": 1, "gate": {"most": {"text_loss": 0.1}, "least": {"format": 2.0}}}, STAGES[1]]
    path = written(tmp_path, shop, "stopped", stages)
    plan = StagesPlan.read(path)
    found = run_stages(plan, lambda _stage, _done, _total: None)
    assert len(found["rows"]) == 2 and "text_loss" in found["stopped"] and "format" in found["stopped"]
    with pytest.raises(GateFailed, match=r"1-read: format .*least 2"):
        refuse_if_stopped(found, plan)
    shown = CliRunner().invoke(app, ["stages", str(path), "--dry-run", "--json"])
    assert [row["there"] for row in json.loads(shown.stdout)["stages"]] == [True, False]
    path.write_text(path.read_text().replace("steps: 1\n", "steps: 2\n"))
    with pytest.raises(BrewlineError, match=r"stage.steps was 1, is 2"):
        run_stages(StagesPlan.read(path), lambda _stage, _done, _total: None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stages": []}, "no stages"),
        ({"start": {"size.width": 3}}, "unknown settings size.width"),
        ({"start": {"steps": 3}}, "start: steps is not for step 0"),
        ({"stages": [{**STAGES[0], "gate": {"least": {"charm": 1}}}]}, "unknown measures charm"),
        ({"stages": [STAGES[1], STAGES[1]]}, "names of stages must differ"),
        ({"stages": [{**STAGES[3], "beta": 0}]}, "beta must be above 0"),
        ({"stages": [{"kind": "dream", "name": "x"}]}, "dream"),
        ({"stages": [{**STAGES[3], "beta": NAN}]}, "beta must be above 0"),
        ({"stages": [{**STAGES[3], "anchor": NAN}]}, "anchor must be 0 or more"),
        ({"stages": [{**STAGES[1], "learning_rate": NAN}]}, "learning_rate must be above 0"),
        ({"stages": [{**STAGES[1], "temperature": 0}]}, "temperature must be above 0"),
        ({"stages": [{**STAGES[1], "candidates": 0}]}, "candidates must be above 0"),
        ({"stages": [{**STAGES[1], "others": -1}]}, "others must be 0 or more"),
        ({"stages": [{**STAGES[0], "tokens": 0}]}, "tokens must be above 0"),
        ({"stages": [{**STAGES[1], "gate": {"least": {"auc": NAN}}}]}, "no finite number"),
        ({"stages": [{**STAGES[1], "gate": {"lost": {"ne": NAN}}}]}, "no finite number"),
        ({"stages": [{**STAGES[1], "gate": {"least": {"surface_auc": 0.5}}}], "surface": ""}, "the plan names no `surface`"),
        ({"start": {"lora_rank": 4}}, "start: lora_rank is not for step 0"),
        ({"start": {"loop.candidates": 4}}, "start: loop.candidates is not for step 0"),
        ({"unseen": "no-such-file.yaml#hide"}, "no-such-file.yaml: cannot be read"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BrewlineError, match=said):
        StagesPlan.read(written(tmp_path, tmp_path, "wrong", **{"stages": STAGES, **more}))
    (tmp_path / "torn.yaml").write_text("a: [1")
    with pytest.raises(PlanError, match="cannot be read as YAML"):
        StagesPlan.read(tmp_path / "torn.yaml")


def test_the_example_is_a_plan_whose_gates_can_be_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    plan = StagesPlan.read(Path("benchmarks/stages.yaml"))
    assert [stage.kind for stage in plan.stages] == ["text", "tasks", "instructions", "align"]
    assert not any("format" in stage.gate.least for stage in plan.stages), "no stage of a new model puts probability on answers"


def test_unseen_means_unseen_and_a_surface_must_be_there(shop: Path, tmp_path: Path) -> None:
    taught = written(tmp_path, shop, "taught", STAGES[:1])
    (tmp_path / "tasks.yaml").write_text(TASKS.replace("action: hide, held_out: true", "action: like"))
    with pytest.raises(BrewlineError, match="'hide' has the answers of 'hide', which is taught"):
        run_stages(StagesPlan.read(taught), lambda _stage, _done, _total: None)
    (tmp_path / "tasks.yaml").write_text(TASKS.replace("action: hide", "surface: mail"))
    with pytest.raises(BrewlineError, match="'hide' has the answers of 'label', which is taught"):
        run_stages(replace(StagesPlan.read(taught), surface="", out=tmp_path / "part"), lambda _stage, _done, _total: None)
    lost = StagesPlan.read(written(tmp_path, shop, "lost", STAGES[:1], surface="moon"))
    with pytest.raises(BrewlineError, match="surface 'moon' is not in tiny; it has mail, feed"):
        run_stages(lost, lambda _stage, _done, _total: None)


def test_preferences_are_those_of_pairs_within_a_group() -> None:
    logit = torch.tensor([1.0, 0.0, 2.0, 5.0, -3.0], requires_grad=True)
    before = torch.tensor([0.5, 0.5, 0.0, 9.0, 9.0])
    label = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    found = preference(logit, before, label, [3, 2], beta=2.0)
    gains = [(1.0 - 0.5) - (0.0 - 0.5), (2.0 - 0.0) - (0.0 - 0.5)]
    assert float(found.detach()) == pytest.approx(np.mean([np.log1p(np.exp(-2.0 * gain)) for gain in gains]), rel=1e-6)
    found.backward()
    assert logit.grad is not None and logit.grad[3:].abs().sum() == 0, "a group with one answer prefers nothing"
    assert logit.grad[0] < 0 < logit.grad[1]
    assert float(preference(logit.detach(), before, torch.ones(5), [3, 2], 1.0)) == 0


def test_the_loss_of_texts_does_not_see_padding() -> None:
    torch.manual_seed(0)
    model = new_llama(Size(hidden=16, layers=1, heads=2, kv_heads=1, mlp=32), 20, causal_lm=True)
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    with torch.no_grad():
        apart = [float(text_loss(model, [row], 0)) for row in rows]  # type: ignore[arg-type]
        both = float(text_loss(model, rows, 0))  # type: ignore[arg-type]
        asked = list[int]()
        model.get_output_embeddings().register_forward_hook(lambda _head, given, _said: asked.append(given[0].numel() // 16))
        text_loss(model, rows, 0)  # type: ignore[arg-type]
    assert both == pytest.approx((5 * apart[0] + 2 * apart[1]) / 7, rel=1e-5)
    assert asked == [7], "the whole vocabulary is scored for tokens, not for padding"
