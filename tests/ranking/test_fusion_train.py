"""The head is trained at the end of a ranker's training, judged as it serves, and part of the fingerprint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ranking.cli.evaluate import app
from ranking.evaluate import labelled_test_rows
from ranking.fusion import FUSION_FILE, Blend, Head
from ranking.fusion_features import Asked, Facts, connected_to
from ranking.fusion_rows import FeatureRows
from ranking.learn import validate
from ranking.learn.examples import SAMPLED, GroupSettings, held_back, pools_of, taught
from ranking.learn.loop import LoopSettings
from ranking.learn.start import RankerPlan, start
from ranking.learn.train import train_ranker
from ranking.prompts import RankBudgets, relations_of
from ranking.ranker import Ranker
from ranking.tasks import tasks_of
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, MemberView
from retrieval.data.write import write_dataset
from retrieval.encoder import VALIDATION, Encoder, save_encoder
from retrieval.evidence.protocol import engagements
from retrieval.learn.checkpoint import DECISION
from retrieval.learn.start import EncoderPlan
from retrieval.learn.start import start as start_encoder
from retrieval.llama import Size
from retrieval.pooled_rate import POOLED, PooledRates

PLAN = RankerPlan(
    steps=2,
    minutes=None,
    size=Size(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    budgets=RankBudgets(item=48, prefix=160),
    loop=LoopSettings(learning_rate=5e-3, candidates=48),
)


@pytest.fixture(scope="module")
def trained(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "ranker"
    train_ranker(tiny_dataset, out, PLAN)
    return out


def served(dataset: Dataset, ranker: Ranker, event: int) -> float:
    """The fused score of one event through `Ranker.score`, from a view and numbers written down by hand."""
    log = dataset.events
    moment, member, item = int(log.timestamp[event]), int(log.member[event]), int(log.item[event])
    liked = dataset.engagements
    past = np.flatnonzero((liked.member == member) & (liked.timestamp < moment))
    edges = dataset.connections_of(member, before=moment)
    view = MemberView(dataset.members[member], engagements(dataset, liked, past, {}), edges)
    counts = Counts.from_dataset(dataset)
    day, row = np.array([moment // DAY]), np.array([item])
    record = dataset.items[item]
    pooled = PooledRates.from_dataset(dataset).at(row, day)
    numbers = {**counts.at(row, day), POOLED: pooled, **{name: column[row] for name, column in dataset.items.numbers.items()}}
    relations = relations_of(edges, [record.creator])
    rate = counts.at(liked.item[past], np.repeat(day, len(past)))["positive_rate"]
    facts = Facts(numbers, [record.category], [record.creator])
    asked = Asked(moment, view.history, rate, facts, connected_to(relations), np.array([np.nan]))
    tokens = ranker.item_tokens([record], counts.at(row, day))
    return float(ranker.score(view, tokens, "label", relations, asked)[0])


def test_the_evaluation_writes_the_scores_that_are_served(trained: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_dataset(tiny_dataset, data)
    found = CliRunner().invoke(app, ["ranking", str(data), "--ranker", str(trained), "--out", str(out), "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert [run["name"] for run in report["variants"]] == ["Ranker, text only", "Ranker, without text"]
    assert report["model"]["name"] == "Ranker, fused" and "text logit" in report["fusion_verdict"]
    assert set(report["auc_model_minus_variant"]) == {"text only", "without text"}
    assert 0 < report["tasks"]["like"]["auc"] < 1 and list(report["tasks"]) == ["like"]
    table = pq.read_table(out / "scores.parquet")
    scores, text = np.array(table["score"]), np.array(table["score_text"])
    rows = labelled_test_rows(tiny_dataset)
    assert table["event_id"].to_pylist() == rows.event_id.tolist() and np.abs(scores - text).max() > 0.01
    ranker = Ranker.load(trained)
    for row in (0, len(rows) // 2, len(rows) - 1):
        assert scores[row] == pytest.approx(served(tiny_dataset, ranker, int(rows.event[row])), abs=2e-5)
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "Ranker, text only" in page and "data:image/png" in page and "<script" not in page
    small = CliRunner().invoke(app, ["ranking", str(data), "--ranker", str(trained), "--arithmetic", "int8", "--json"])
    told = json.loads(small.stdout)
    assert (report["arithmetic"], told["arithmetic"]) == ("float32", "int8")
    assert 0 < abs(told["model"]["metrics"]["log_loss"] - report["model"]["metrics"]["log_loss"]) < 0.05


def test_the_cosine_is_standardised_for_the_encoder_that_serves(tiny_dataset: Dataset, tmp_path: Path) -> None:
    meta, folder, out = tiny_dataset.meta, tmp_path / "encoder", tmp_path / "ranker"
    for place, cut, seed in ((folder, meta.cut_test, 0), (folder / VALIDATION, meta.cut_valid, 1)):
        made = start_encoder(tiny_dataset, cut, EncoderPlan(steps=1, size=PLAN.size, seed=seed), 1)
        save_encoder(place, made.model, made.sampler.writer, {"data": meta.name, "cut": cut, "note": ""})
    plan = replace(PLAN, encoder=str(folder))
    train_ranker(tiny_dataset, out, plan)
    fitted = Blend.from_facts(json.loads((out / "training" / DECISION).read_text())["blend"])
    served = Head.load(out).blend
    trainer = start(tiny_dataset, meta.cut_test, plan, 1)
    pool, groups = validate.labels_judged(validate.window_pools(tiny_dataset, trainer, plan))
    rows = FeatureRows(tiny_dataset, meta.cut_test, 0.5)
    for place, blend in ((folder / VALIDATION, fitted), (folder, served)):
        said = rows.cosines(pool, groups, Encoder.load(place))
        assert (blend.centre, blend.spread) == pytest.approx((said.mean(), said.std()), abs=1e-6)
    assert abs(served.centre - fitted.centre) > 0.01 and served.weight.tolist() == fitted.weight.tolist()


def test_drawn_candidates_leave_with_their_engagement(tiny_dataset: Dataset) -> None:
    events = tiny_dataset.engagements
    dataset = replace(tiny_dataset, events=replace(events, label=np.full(len(events), -1, np.int8)))
    held, cut = held_back(dataset, 0), dataset.meta.cut_valid
    whole = pools_of(dataset, tasks_of(dataset), None, dataset.meta.cut_test, GroupSettings(), 0)
    kept = taught(dataset, whole, held)["engage"]
    owner = np.repeat(kept.member, np.diff(kept.start))
    assert (kept.event == SAMPLED).any() and (kept.day[held[owner]] * DAY < cut).all()
    late = (kept.event != SAMPLED) & (dataset.events.timestamp[kept.event] >= cut)
    assert late.any() and not (late & held[owner]).any() and (kept.label[kept.start[:-1]] == 1).all()
    assert len(kept.label) < len(whole["engage"].label)


def test_the_head_is_part_of_the_fingerprint_and_may_be_left_out(trained: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    ranker = Ranker.load(trained)
    assert ranker.head is not None and ranker.fuses("label") and ranker.fuses() and not ranker.fuses("like")
    bare = tmp_path / "bare"
    assert train_ranker(tiny_dataset, bare, replace(PLAN, fusion=False)).fingerprint != ranker.fingerprint
    assert Ranker.load(bare).head is None and not (bare / FUSION_FILE).exists()
    held = (trained / FUSION_FILE).read_text()
    (bare / FUSION_FILE).write_text(held)
    before = Ranker.load(bare).fingerprint
    (bare / FUSION_FILE).write_text(held + "\n")
    assert Ranker.load(bare).fingerprint != before


def test_the_refit_is_calibrated_on_members_that_it_was_not_taught(
    tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, held = tiny_dataset.meta, held_back(tiny_dataset, 0)
    assert 0 < held.sum() < len(held) / 2
    trainer = start(tiny_dataset, meta.cut_test, PLAN, 2, held=held)
    whole = start(tiny_dataset, meta.cut_test, PLAN, 2)
    learned, asked = trainer.pools["label"], whole.pools["label"]
    pool = pools_of(tiny_dataset, trainer.writer.tasks, meta.cut_valid, meta.cut_test, GroupSettings(least=1), 0)["label"]
    judged, taught = set(pool.only(held[pool.member]).event.tolist()), set(learned.event.tolist())
    straddling = held[asked.member] & (asked.moment < meta.cut_valid)
    assert judged & set(asked.only(straddling).event.tolist()), "no group begins before the cut and ends after it"
    assert not taught & judged and taught | judged == set(asked.event.tolist())
    monkeypatch.setattr(validate, "HELD_LEAST", 5)
    trainer.run(2)
    wanted, _ = validate.recalibrated(tiny_dataset, trainer, replace(PLAN, calibration="temperature"), held)["label"]
    assert wanted.method == "temperature"
    assert wanted.n == np.diff(pool.start)[held[pool.member]].sum()
