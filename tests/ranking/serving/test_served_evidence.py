"""The end-to-end evaluation: what it says members get is what a gRPC server gives them, and what each event scored alone gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from ranking.calibrate import Calibrator
from ranking.cli.main import app
from ranking.evaluate import labelled_test_rows
from ranking.fusion import Blend, Head
from ranking.fusion_rows import FeatureRows, training_pool
from ranking.prompts import RankBudgets, RankPrompts
from ranking.ranker import Ranker, RankerFacts, labels_of, save_ranker
from ranking.scored import score_rows
from ranking.served_evidence import FOUND, HYBRID_FOUND, HYBRID_RANKED, RANKED, evaluate_served, write_served
from ranking.served_evidence_table import served_table
from ranking.serving.client import Client
from ranking.serving.stack import open_stack
from ranking.tasks import tasks_of
from ranking.trees import Boosting, grow
from retrieval.data.schema import DAY, EVENT_COLUMNS, TEST, Dataset
from retrieval.data.write import write_dataset
from retrieval.encoder import Encoder, save_encoder
from retrieval.evidence.compare import compare, read_run
from retrieval.features import Quantizer
from retrieval.hybrid import HybridSettings
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

SIZE = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)
WEIGHTS = "1,0.6,0.3"
Start = Callable[..., tuple[int, Callable[[], None]]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens) -> Path:
    """A folder with data whose members all ask at the test cut, an encoder, a ranker of words (`text`) and one with a head."""
    folder = tmp_path_factory.mktemp("shop")
    write_dataset(asking_at_the_cut(tiny_dataset), folder / "data")
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    torch.manual_seed(8)
    encoder = save_encoder(folder / "encoder", new_llama(SIZE, len(tiny_tokens), causal_lm=False), writer, {})
    prompts, tasks = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets()), tasks_of(tiny_dataset)
    facts = RankerFacts(tasks, labels_of(tiny_tokens, tasks), RankBudgets(), {}, encoder, {})
    model = new_llama(SIZE, len(tiny_tokens), causal_lm=True)
    model.model.embed_tokens.weight.data.normal_()
    pool = training_pool(tiny_dataset, tiny_dataset.meta.cut_test, 4_000, 0)
    rows = FeatureRows(tiny_dataset, tiny_dataset.meta.cut_test, 0.4).of(pool, range(len(pool)))
    trees = grow(rows, pool.label.astype(float), Boosting(trees=30, depth=2))
    blend = Blend(np.array([0.8, 0.1, 0.9, 0.4, 1.5]), -0.3, np.array([0.0, 0.0, 1.0, 0.5, 1.0]), 0.1, 0.2, 0.3)
    head = Head(tuple(tiny_dataset.items.numbers), 0.4, trees, Calibrator("platt", 2.0, 0.5, 99), blend)
    save_ranker(folder / "text", model, prompts, facts)
    save_ranker(folder / "fused", model, prompts, facts, head)
    return folder


def asking_at_the_cut(tiny: Dataset) -> Dataset:
    """The tiny shop until the test cut, when every member likes one more item: the night of that moment is every query's."""
    cut, log = tiny.meta.cut_test, tiny.events.before(tiny.meta.cut_test)
    rng = np.random.default_rng(3)
    new = [rng.choice(np.setdiff1d(np.arange(len(tiny.items)), log.item[log.member == row])) for row in range(len(tiny.members))]
    last = log.take(np.full(len(tiny.members), len(log) - 1))
    liked = replace(
        last, event_id=log.event_id.max() + 1 + np.arange(len(new)), member=np.arange(len(new), dtype=np.int32),
        item=np.array(new, np.int32), timestamp=np.full(len(new), cut), label=np.ones(len(new), np.int8),
        action=np.full(len(new), log.actions.index("like"), np.int16), split=np.full(len(new), TEST, np.int8),
        request=np.full(len(new), -1, np.int32), position=np.full(len(new), -1, np.int16),
    )  # fmt: skip
    both = {name: np.concatenate([getattr(log, name), getattr(liked, name)]) for name in EVENT_COLUMNS}
    items = replace(tiny.items, created_at=np.full(len(tiny.items), cut - 30 * DAY))
    return replace(tiny, items=items, events=replace(log, **both))


def brewline(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(("ranker", "counts"), [("text", "frozen"), ("fused", "live")])
def test_both_orders_are_those_of_a_server(
    shop: Path, tmp_path: Path, tiny_dataset: Dataset, start: Start, ranker: str, counts: str
) -> None:
    models = ["--encoder", shop / "encoder", "--ranker", shop / ranker]
    hybrid = ["--hybrid", "--hybrid-weights", WEIGHTS]
    told = brewline("evaluate", "served", shop / "data", *models, "--counts", counts, *hybrid, "--out", tmp_path, "--json")
    assert json.loads(told)["model"]["name"] == RANKED
    cut = tiny_dataset.meta.cut_test
    brewline("nightly", shop / "data", *models, "--store", tmp_path / "store", "--as-of", cut, *hybrid, "--json")
    for first_stage, folder in (("dense", "."), ("hybrid", "hybrid-ranked")):
        rows = pq.read_table(tmp_path / folder / "ranked.parquet").to_pylist()
        assert len(rows) == len(tiny_dataset.members)
        stack = open_stack(tmp_path / "store", shop / "encoder", shop / ranker, None, hybrid=first_stage == "hybrid")
        port, stop = start(stack)
        with Client(f"127.0.0.1:{port}") as client:
            for row in rows:
                found = client.retrieve(row["member_id"], 2_000)
                assert found.ids == row["retrieved_ids"]
                np.testing.assert_allclose(found.scores, row["retrieved_scores"], atol=1e-5)
                ranked = client.recommend(row["member_id"], 2_000)
                assert ranked.ids == row["item_ids"] != row["retrieved_ids"]
                np.testing.assert_allclose(ranked.probabilities, row["scores"], atol=1e-5)
        stop()


def test_over_many_nights_a_target_scores_what_its_event_does_alone(shop: Path, tiny_dataset: Dataset) -> None:
    """`evaluate ranking` scores each labelled event at its own moment, by other code."""
    encoder, ranker = Encoder.load(shop / "encoder"), Ranker.load(shop / "fused")
    report = evaluate_served(tiny_dataset, encoder, ranker, "live")
    rows = labelled_test_rows(tiny_dataset)
    alone = score_rows(tiny_dataset, rows, ranker, "live", encoder).final
    moments = tiny_dataset.events.timestamp[rows.event].tolist()
    known = dict(zip(zip(rows.member.tolist(), rows.item.tolist(), moments), alone))
    ranked, queries, compared = report.ranked, report.queries, set()
    assert ranked is not None
    for at, (query, target) in enumerate(zip(queries.targets.rows.tolist(), queries.targets.values.tolist())):
        key = (int(queries.member[query]), target, int(queries.timestamp[query]))
        if key in known:
            place = ranked.rows[query].tolist().index(target)
            assert ranked.scores[query, place] == pytest.approx(known[key], abs=2e-5), at
            compared.add(key[2] // DAY)
    assert len(compared) == 3


def test_the_numbers_follow_from_the_lists_and_are_paired(shop: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    models = ["--encoder", shop / "encoder", "--ranker", shop / "fused"]
    found = json.loads(brewline("evaluate", "served", shop / "data", *models, "--out", tmp_path, "--json"))
    data = asking_at_the_cut(tiny_dataset)
    last = data.events.timestamp == tiny_dataset.meta.cut_test
    target = {f"m{row}": data.items.item_id[item] for row, item in zip(data.events.member[last], data.events.item[last])}
    rows = pq.read_table(tmp_path / "ranked.parquet").to_pylist()
    for metrics, ids in ((found["model"], "item_ids"), (found["baselines"][0], "retrieved_ids")):
        places = np.array([row[ids].index(target[row["member_id"]]) for row in rows])
        assert metrics["metrics"]["recall@10"]["value"] == pytest.approx((places < 10).mean())
        assert metrics["metrics"]["mrr"]["value"] == pytest.approx((1 / (places + 1)).mean())
    lead = found["model_minus_baseline"][FOUND]["mrr"]
    told = [one["metrics"]["mrr"]["value"] for one in (found["model"], found["baselines"][0])]
    assert lead["value"] == pytest.approx(told[0] - told[1]) and lead["low"] < lead["value"] < lead["high"]
    slices = found["ranked_minus_retrieval_by_slice"]
    sizes = {name: one["n"] for name, one in found["model"]["slices"].items()}
    assert set(slices) == {name for name, n in sizes.items() if n}
    weighed = sum(slices[name]["mrr"]["value"] * sizes[name] for name in slices if name.startswith("history"))
    assert weighed / len(rows) == pytest.approx(lead["value"])
    again = compare([read_run(tmp_path)], read_run(tmp_path, FOUND))
    assert again.differences["mrr"].value == pytest.approx(lead["value"])


def test_a_sample_and_the_hybrid_say_what_they_are(shop: Path, tiny_dataset: Dataset) -> None:
    from rich.console import Console

    encoder, ranker, seen = Encoder.load(shop / "encoder"), Ranker.load(shop / "text"), list[tuple[int, int]]()
    settings = HybridSettings.parse(WEIGHTS)
    report = evaluate_served(
        tiny_dataset, encoder, ranker, "frozen", hybrid=settings, sample=5, progress=lambda *now: seen.append(now)
    )
    assert seen == [(done, 10) for done in range(1, 11)]
    assert (report.facts["members"], report.facts["sampled"]) == (5, True)
    (other,) = report.apart
    assert (other.own.name, [run.name for run in other.baselines]) == (HYBRID_RANKED, [HYBRID_FOUND, RANKED])
    with (console := Console(width=130)).capture() as said:
        console.print(served_table(report))
    assert f"5 members, a SAMPLE of {report.facts['members_in_window']}" in said.get() and HYBRID_RANKED in said.get()


class Killed(BaseException):
    """A process that ends here."""


@pytest.mark.parametrize("written", [2, 3])
def test_a_kill_leaves_no_list_under_another_ones_name(
    shop: Path, tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    report = evaluate_served(tiny_dataset, Encoder.load(shop / "encoder"), Ranker.load(shop / "text"), "frozen", sample=5)
    left, really = [written], pq.write_table

    def until_killed(*how: object) -> None:
        really(*how)
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    monkeypatch.setattr(pq, "write_table", until_killed)
    with pytest.raises(Killed):
        write_served(report, tiny_dataset, tmp_path)
    assert report.ranked is not None
    ids = [[tiny_dataset.items.item_id[row] for row in rows[rows >= 0]] for rows in report.ranked.rows]
    assert pq.read_table(tmp_path / "ranked.parquet")["item_ids"].to_pylist() == ids
