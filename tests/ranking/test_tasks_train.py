"""A ranker of written-down tasks: what training sees of them, what the folder keeps, and how an unseen one is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ranking.evaluate import RankingEvidenceError
from ranking.learn.batches import GroupWriter, Order
from ranking.learn.examples import GroupSettings, pools_of, thinned
from ranking.learn.loop import LoopSettings
from ranking.learn.questions import ground_of
from ranking.learn.settings import with_settings
from ranking.learn.start import RankerPlan, start
from ranking.learn.train import train_ranker
from ranking.prompts import RankBudgets, RankLayout, RankPrompts
from ranking.ranker import FACTS, Ranker, RankerError, read_facts
from ranking.shots_past import PastShots
from ranking.tasks import Task, TaskError, tasks_of
from ranking.unseen import judge_task, named_or_read
from retrieval.data.schema import DAY, Dataset
from retrieval.data.write import write_dataset
from retrieval.learn.checkpoint import TrainingError
from retrieval.llama import Size

LABEL = Task("label", "predict likes", "liked?", positive="yes", negative="no")
LIKE = Task("like", "predict what the member will like", "will the member like?", "like", held_out=True)
PLAN = RankerPlan(
    steps=2,
    minutes=None,
    size=Size(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    budgets=RankBudgets(item=48, prefix=160),
    loop=LoopSettings(learning_rate=5e-3, candidates=48),
    layout=RankLayout(relevant=2, cold=3),
    fusion=False,
    tasks=(LABEL, LIKE),
    shots=4,
)


@pytest.fixture(scope="module")
def folder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("tasks") / "ranker"
    train_ranker(tiny_dataset, out, PLAN)
    return out


@pytest.fixture(scope="module")
def ranker(folder: Path) -> Ranker:
    return Ranker.load(folder)


def test_the_folder_keeps_tasks_layout_and_examples(ranker: Ranker) -> None:
    assert list(ranker.tasks.values()) == [LABEL, LIKE] and ranker.facts.layout == PLAN.layout
    assert list(ranker.prompts.shots) == ["label"] and len(ranker.prompts.shots["label"]) == 4
    assert list(ranker.facts.calibrators) == ["label"], "nothing is fitted to the answers of a held-out task"
    assert "tasks" not in ranker.facts.training["settings"] and ranker.facts.training["settings"]["shots"] == 4
    assert ranker.prompts.layout == PLAN.layout


def test_a_held_out_task_is_never_trained_on(tiny_dataset: Dataset, ranker: Ranker) -> None:
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 2)
    assert list(trainer.pools) == ["label"] and "like" in trainer.labels
    ground = ground_of(tiny_dataset, ranker, 200)
    assert list(ground.pools) == list(ground.held) == ["label"]


def test_a_folder_of_before_loads_as_it_was_trained(folder: Path, tmp_path: Path) -> None:
    facts = json.loads((folder / FACTS).read_text())
    kept = ("name", "instruction", "question", "action", "positive", "negative")
    facts["tasks"] = [{name: task[name] for name in kept} for task in facts["tasks"]]
    del facts["layout"], facts["shots"]
    (tmp_path / FACTS).write_text(json.dumps(facts))
    old = read_facts(tmp_path)
    assert old.tasks == {"label": LABEL, "like": replace(LIKE, held_out=False)} and old.layout == RankLayout() and not old.shots
    (tmp_path / FACTS).write_text(json.dumps({**facts, "layout": {"sideways": True}}))
    with pytest.raises(RankerError, match="sideways"):
        read_facts(tmp_path)


def test_an_unseen_task_is_judged_with_and_without_examples(tiny_dataset: Dataset, ranker: Ranker) -> None:
    alone = judge_task(tiny_dataset, ranker, LIKE, "live")
    shown = judge_task(tiny_dataset, ranker, LIKE, "live", shots=6)
    assert (alone.taught, alone.shots, alone.calibrated, shown.shots) == ("", 0, False, 6)
    assert alone.candidates == shown.candidates > 100 and 0 < alone.positive_share < 1
    assert alone.judged.auc.low <= alone.judged.auc.value <= alone.judged.auc.high
    cold = shown.judged.slices["history 0"]
    assert cold["n"] == 0 or cold["mean_prediction"] != alone.judged.slices["history 0"]["mean_prediction"]
    other = judge_task(tiny_dataset, ranker, replace(LABEL, name="said otherwise", question="a like?"), "frozen")
    assert other.taught == "label" and not other.calibrated
    assert judge_task(tiny_dataset, ranker, LABEL, "frozen").calibrated


def test_what_cannot_be_judged_says_so(tiny_dataset: Dataset, ranker: Ranker) -> None:
    with pytest.raises(TaskError, match="engagements against drawn items"):
        judge_task(tiny_dataset, ranker, Task("engage", "a", "b"), "live")
    with pytest.raises(RankingEvidenceError, match=r"all .* answers to task 'share' in the test window are 0"):
        judge_task(tiny_dataset, ranker, Task("share", "a", "b", "share"), "live")
    with pytest.raises(RankingEvidenceError, match="nothing after the test cut answers"):
        judge_task(tiny_dataset, ranker, Task("moon", "a", "b", "like", surface="moon"), "live")
    with pytest.raises(TaskError, match="knows label, like"):
        named_or_read("moon", ranker.tasks)
    assert named_or_read("like", ranker.tasks) == LIKE


def test_the_commands_take_a_file_of_tasks(tiny_dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    from ranking.cli.evaluate import app
    from ranking.cli.ranker import app as ranker_app

    write_dataset(tiny_dataset, tmp_path / "data")
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks: [{name: keep, instruction: a, question: b, action: like}]")
    asked = ["ranking", str(tmp_path / "data"), "--ranker", str(folder), "--task", f"{path}#keep", "--shots", "2", "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["task"]["name"], found["shots"], found["taught"]) == ("keep", 2, "") and 0 < found["auc"]["value"] < 1
    shown = CliRunner().invoke(app, asked[:-1])
    assert "never trained on" in shown.stdout
    path.write_text("tasks: [{name: keep, instruction: a, question: b, action: fly}]")
    refused = CliRunner().invoke(
        ranker_app, ["train", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--steps", "1", "--tasks", str(path)]
    )
    assert isinstance(refused.exception, TaskError) and "after impressions: like" in str(refused.exception)


def test_settings_are_named_or_refused() -> None:
    plan = with_settings(PLAN, ["layout.grouped=true", "loop.temperature=2", "groups.rare=0.05", "layout.spare_positives=null"])
    assert plan.layout.grouped and plan.loop.temperature == 2 and plan.groups.rare == 0.05 and plan.tasks == PLAN.tasks
    assert with_settings(PLAN, []) is PLAN
    for pair, says in (("layout.sideways=1", "sideways"), ("speed=1", "layout.NAME"), ("layout.cold=soon", "cold")):
        with pytest.raises(TrainingError, match=says):
            with_settings(PLAN, [pair])


def test_a_mixing_temperature_decides_each_tasks_share_of_a_round(tiny_dataset: Dataset) -> None:
    whole = pools_of(tiny_dataset, tasks_of(tiny_dataset), None, tiny_dataset.meta.cut_test, GroupSettings(), 0)
    pools = {"label": whole["label"], "like": whole["like"].only(np.arange(len(whole["like"])) % 8 == 0)}
    first, rare = len(pools["label"]), len(pools["like"])
    for temperature, wanted in ((None, round(0.05 * first)), (1.0, rare), (0.5, round(first * (rare / first) ** 2))):
        order, seen = Order(pools, 0.05, 48, 0, temperature), list[tuple[str, int]]()
        while order.cursor[0] == 0 and len(seen) < first + wanted:
            seen += order.next()
        likes = [group for task, group in seen[: first + wanted] if task == "like"]
        assert len(likes) == len(set(likes)) == wanted
    assert 0 < round(first * (rare / first) ** 2) < rare


def test_thinned_negatives_of_a_rare_action_are_corrected(tiny_dataset: Dataset) -> None:
    tasks = tasks_of(tiny_dataset)
    pools = pools_of(tiny_dataset, tasks, None, tiny_dataset.meta.cut_test, GroupSettings(), 0)
    share = float(pools["like"].label.mean())
    rare = (1 + share) / 2
    found, corrections = thinned(pools, tasks, rare, 0)
    assert found["label"] is pools["label"] and list(corrections) == ["like"]
    assert found["like"].label.sum() == pools["like"].label.sum() and abs(found["like"].label.mean() - rare) < 0.02
    said = np.log(share / (1 - share)) + corrections["like"]
    assert 1 / (1 + np.exp(-said)) == pytest.approx(rare, abs=1e-6)
    assert thinned(pools, tasks, share / 2, 0) == (pools, {}) and thinned(pools, tasks, 0.0, 0)[1] == {}


def test_a_correction_is_added_in_the_loss_alone(tiny_dataset: Dataset) -> None:
    tasks = {name: replace(task, held_out=False) for name, task in tasks_of(tiny_dataset).items()}
    plan = replace(PLAN, tasks=(tasks["like"],), groups=GroupSettings(rare=0.9), wishes=0.0)
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 1)
    assert trainer.variety is not None and trainer.variety.corrections["like"] > 0
    batch = trainer.writer.write(trainer.pools, [("like", 0), ("like", 1)])
    logits = trainer.read(batch)[1].detach().double().numpy() + trainer.variety.corrections["like"]
    wanted = np.mean(np.logaddexp(0, logits) - batch.label * logits)
    assert float(trainer.loss(batch).detach()) == pytest.approx(float(wanted), abs=1e-5)


def test_an_answer_that_a_wish_decided_knows_neither_thinning_nor_places(tiny_dataset: Dataset) -> None:
    tasks = {name: replace(task, held_out=False) for name, task in tasks_of(tiny_dataset).items()}
    plan = replace(PLAN, tasks=(tasks["like"],), groups=GroupSettings(rare=0.9), wishes=1.0)
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 1)
    assert trainer.variety is not None and trainer.positions is not None
    known = trainer.positions.state()
    trainer.positions.restore({**known, "logit": [0.5] * len(known["logit"])})
    chosen, pool = [("like", group) for group in range(8)], trainer.pools["like"]
    said = trainer.variety.of(trainer.pools, chosen, 0)
    batch = trainer.writer.write(trainer.pools, chosen, said)
    whole = slice(0, int(pool.start[8]))
    ruled = batch.event < 0
    assert any(one.wish for one in said) and 0 < ruled.sum() < len(ruled) and (batch.label != pool.label[whole]).sum() > 0
    assert not (~ruled & (batch.label != pool.label[whole])).any() and (batch.event[~ruled] == pool.event[whole][~ruled]).all()
    logits = trainer.placed(batch, trainer.read(batch)[1]).detach().double().numpy()
    logits = logits + np.where(ruled, 0.0, trainer.variety.corrections["like"])
    wanted = np.mean(np.logaddexp(0, logits) - batch.label * logits)
    assert float(trainer.loss(batch).detach()) == pytest.approx(float(wanted), abs=1e-5)
    placed = trainer.positions.added(batch).detach().numpy() != 0
    assert placed.any() and not placed[ruled].any(), "nor does it teach anything of places"


def test_who_is_asked_about_the_past_reads_examples_of_the_past(tiny_dataset: Dataset, ranker: Ranker) -> None:
    """In training, distillation and calibration; the examples of the folder are of the test cut, the reader's own among them."""
    cut, tasks = tiny_dataset.meta.cut_test, {"label": LABEL}
    past = PastShots(tiny_dataset, tasks, 4, cut)
    writers = [start(tiny_dataset, cut, PLAN, 2).writer, ground_of(tiny_dataset, ranker, 200).writer]
    moment = tiny_dataset.meta.cut_valid - 12 * DAY  # when all members are cold
    for member in range(3):
        for writer in writers:
            own = writer.prompts
            shots = {"label": past.before("label", moment, member)}
            known = RankPrompts(own.tokens, own.quantizer, own.budgets, own.layout, shots)
            wanted = GroupWriter(tiny_dataset, known, tasks, cut).prefix(member, moment, LABEL)
            assert writer.prefix(member, moment, LABEL) == wanted
            assert GroupWriter(tiny_dataset, writer.prompts, tasks, cut).prefix(member, moment, LABEL) != wanted
