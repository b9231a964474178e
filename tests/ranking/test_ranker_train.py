"""Training sees only the past, reads what serving will read, and learns a planted rule."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.calibrate import auc
from ranking.export import export_ranker
from ranking.learn import validate
from ranking.learn.batches import GroupWriter
from ranking.learn.examples import SAMPLED, GroupSettings, pools_of
from ranking.learn.loop import LoopSettings
from ranking.learn.start import RankerPlan, start
from ranking.learn.train import TrainReport, train_ranker
from ranking.learn.validate import judge
from ranking.prefill.onnx_engine import OnnxEngine
from ranking.prefill.onnx_folder import NotAdmitted
from ranking.prefill.request import Request
from ranking.prompts import RankBudgets
from ranking.ranker import Ranker
from ranking.tasks import tasks_of
from retrieval.data.schema import Dataset
from retrieval.data.write import write_dataset
from retrieval.learn.checkpoint import TrainingError
from retrieval.llama import Size

SMALL = RankerPlan(
    steps=3,
    minutes=None,
    size=Size(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    budgets=RankBudgets(item=48, prefix=160),
    loop=LoopSettings(learning_rate=5e-3, candidates=48),
)


def test_training_learns_the_planted_rule(tiny_dataset: Dataset) -> None:
    settings = replace(SMALL, steps=70, loop=replace(SMALL.loop, others=0.2))
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, settings, 70)
    pools = pools_of(tiny_dataset, trainer.writer.tasks, tiny_dataset.meta.cut_test, 1 << 60, settings.groups, 0)
    writer = GroupWriter(tiny_dataset, trainer.writer.prompts, trainer.writer.tasks, 1 << 60)
    before = auc(*judge(trainer, writer, pools)["label"])
    trainer.run(70)
    losses = [point["loss"] for point in trainer.curve]
    assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:8])
    after = judge(trainer, writer, pools)
    assert auc(*after["label"]) > max(0.85, before + 0.02)
    assert auc(*after["like"]) > 0.75


def test_equal_steps_and_seed_give_equal_weights_also_after_a_kill(tiny_dataset: Dataset, tmp_path: Path) -> None:
    cut = tiny_dataset.meta.cut_test
    whole = start(tiny_dataset, cut, SMALL, 4)
    whole.run(4)
    halfway = start(tiny_dataset, cut, SMALL, 4)
    halfway.run(2)
    halfway.save(tmp_path)
    resumed = start(tiny_dataset, cut, SMALL, 4)
    assert not resumed.resume(tmp_path / "nothing")
    assert resumed.resume(tmp_path)
    resumed.run(4)
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, two), name
    assert [point["loss"] for point in whole.curve] == [point["loss"] for point in resumed.curve]
    other = start(tiny_dataset, cut, replace(SMALL, seed=1), 4)
    with pytest.raises(TrainingError, match="another plan"):
        other.resume(tmp_path)


@pytest.fixture(scope="module")
def trained(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    out = tmp_path_factory.mktemp("trained") / "ranker"
    return out, train_ranker(tiny_dataset, out, SMALL)


def test_a_training_leaves_a_complete_folder_and_says_what_it_reached(
    trained: tuple[Path, TrainReport], tiny_dataset: Dataset
) -> None:
    out, report = trained
    ranker = Ranker.load(out)
    assert ranker.fingerprint == report.fingerprint and report.steps == 3
    assert list(ranker.tasks) == report.tasks == ["label", "like"]
    assert 0 < report.validation["label"]["auc"] < 1 and ranker.facts.encoder is None
    assert ranker.facts.calibrators["label"].n == report.validation["label"]["candidates"]
    assert not (out / "training" / "checkpoint").exists()
    with pytest.raises(TrainingError, match="already holds a ranker"):
        train_ranker(tiny_dataset, out, SMALL)


def test_the_same_training_gives_the_same_fingerprint(
    trained: tuple[Path, TrainReport], tiny_dataset: Dataset, tmp_path: Path
) -> None:
    assert train_ranker(tiny_dataset, tmp_path / "again", SMALL).fingerprint == trained[1].fingerprint


def test_minutes_become_steps_that_reproduce_the_weights(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "affordable", lambda *_: 3)
    by_time = train_ranker(tiny_dataset, tmp_path / "time", replace(SMALL, steps=None, minutes=0.1))
    by_steps = train_ranker(tiny_dataset, tmp_path / "steps", replace(SMALL, steps=by_time.steps))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("time", "steps")]
    assert weights[0] == weights[1] and by_steps.steps == by_time.steps


@pytest.mark.parametrize("lora", [None, 2])
def test_a_checkpoint_is_a_start(
    trained: tuple[Path, TrainReport], tiny_dataset: Dataset, tmp_path: Path, lora: int | None
) -> None:
    plan = replace(SMALL, base=str(trained[0]), lora_rank=lora, loop=replace(SMALL.loop, learning_rate=1e-3))
    report = train_ranker(tiny_dataset, tmp_path / "ranker", plan)
    ranker = Ranker.load(tmp_path / "ranker")
    held, first = (dict(model.named_parameters()) for model in (ranker.engine.model, Ranker.load(trained[0]).engine.model))
    assert held.keys() == first.keys()
    moved = held["model.layers.0.mlp.up_proj.weight"] - first["model.layers.0.mlp.up_proj.weight"]
    assert 0 < moved.abs().max() < 0.05
    assert torch.linalg.matrix_rank(moved) <= lora if lora else report.parameters > 0


def test_an_encoder_is_a_start_and_its_fingerprint_is_kept(tiny_dataset: Dataset, tmp_path: Path) -> None:
    from retrieval.encoder import save_encoder
    from retrieval.learn.fit import EncoderPlan
    from retrieval.learn.fit import start as start_encoder

    size = replace(SMALL.size, layers=1)
    encoder = start_encoder(tiny_dataset, tiny_dataset.meta.cut_test, EncoderPlan(steps=1, size=size), 1)
    fingerprint = save_encoder(tmp_path / "encoder", encoder.model, encoder.sampler.writer, {})
    plan = replace(SMALL, encoder=str(tmp_path / "encoder"))
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 1)
    words = encoder.sampler.writer.tokens.text_ids("espresso roast filter beans roses compost pruning gambit")
    held, own = (model.get_input_embeddings().weight.detach() for model in (encoder.model, trainer.model))
    alike = [torch.corrcoef(torch.nn.functional.normalize(rows[words], dim=1)) for rows in (held, own)]
    assert torch.corrcoef(torch.stack([alike[0].flatten(), alike[1].flatten()]))[0, 1] > 0.7
    train_ranker(tiny_dataset, tmp_path / "ranker", plan)
    assert Ranker.load(tmp_path / "ranker").facts.encoder == fingerprint
    with pytest.raises(TrainingError, match="choose one"):
        start(tiny_dataset, tiny_dataset.meta.cut_test, replace(plan, base="x"), 1)


def test_engagements_alone_are_compared_with_random_items(tiny_dataset: Dataset, tmp_path: Path) -> None:
    likes = tiny_dataset.engagements
    bare = replace(tiny_dataset, events=replace(likes, label=np.full(len(likes), -1, np.int8)), connections=None)
    pool = pools_of(bare, tasks_of(bare), None, bare.meta.cut_test, GroupSettings(), 0)["engage"]
    drawn = pool.event == SAMPLED
    assert 2.5 < drawn.sum() / (~drawn).sum() <= 4
    np.testing.assert_array_equal(pool.label == 0, drawn)
    owner = np.repeat(pool.member, np.diff(pool.start))
    before = likes.before(bare.meta.cut_test)
    known = set(zip(before.member.tolist(), before.item.tolist()))
    assert not known & set(zip(owner[drawn].tolist(), pool.item[drawn].tolist()))
    assert "no rates" in train_ranker(bare, tmp_path / "ranker", SMALL).note


def test_a_folder_without_interactions_says_so(tiny_dataset: Dataset, tmp_path: Path) -> None:
    nothing = replace(tiny_dataset, events=tiny_dataset.events.take(np.zeros(0, np.int64)), connections=None)
    report = train_ranker(nothing, tmp_path / "ranker", SMALL)
    assert "no engagements" in report.note
    assert list(Ranker.load(tmp_path / "ranker").tasks) == ["engage"]


def test_nothing_before_the_cut_is_an_error(tiny_dataset: Dataset, tmp_path: Path) -> None:
    late = replace(tiny_dataset, meta=replace(tiny_dataset.meta, cut_valid=0, cut_test=0))
    with pytest.raises(BrewlineError, match="nothing to learn"):
        train_ranker(late, tmp_path / "ranker", SMALL)


def test_the_command_trains_and_prints_one_object(tiny_dataset: Dataset, tmp_path: Path) -> None:
    from ranking.cli.ranker import app

    write_dataset(tiny_dataset, tmp_path / "data")
    out = tmp_path / "ranker"
    result = CliRunner().invoke(
        app, ["train", str(tmp_path / "data"), "--out", str(out), "--steps", "1", "--learning-rate", "1e-3", "--json"]
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["steps"], printed["learning_rate"]) == (1, 1e-3) and printed["fingerprint"] == Ranker.load(out).fingerprint
    both = CliRunner().invoke(app, ["train", str(tmp_path / "data"), "--out", str(out), "--steps", "1", "--minutes", "1"])
    assert isinstance(both.exception, TrainingError)


def test_an_exported_ranker_scores_as_the_original_and_int8_passes_a_gate_or_is_refused(
    trained: tuple[Path, TrainReport], tiny_dataset: Dataset, tmp_path: Path
) -> None:
    facts = export_ranker(trained[0], tiny_dataset, tmp_path / "float", int8=False)
    assert facts["max_abs_diff"] < 1e-4 and facts["kendall"] > 0.999 and facts["arithmetic"] == "float32"
    ranker, asked = Ranker.load(trained[0]), [Request([3, 4, 5], [[6, 7], [8]])]
    np.testing.assert_allclose(OnnxEngine(tmp_path / "float").score(asked)[0], ranker.engine.score(asked)[0], atol=1e-4)
    assert facts["items"] >= 200 and facts["requests"] * facts["top"] * 2 <= facts["items"]
    with contextlib.suppress(NotAdmitted):
        export_ranker(trained[0], tiny_dataset, tmp_path / "int8", int8=True)
    measured = OnnxEngine(tmp_path / "int8", on_trial=True).facts
    assert measured.quantized and measured.gate is not None and 0 < measured.gate.apart < 0.5
    if measured.gate.kendall >= 0.98 and measured.gate.overlap >= 0.9 and measured.gate.apart <= 0.05:
        OnnxEngine(tmp_path / "int8")
    else:
        with pytest.raises(NotAdmitted, match="has not passed"):
            OnnxEngine(tmp_path / "int8")
