"""What a table reports is what a server answers: the same items in the same order with the same scores, both stages."""

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
from ranking.fusion import Blend, Head
from ranking.fusion_rows import FeatureRows, training_pool
from ranking.pipeline import OtherCosines
from ranking.prompts import RankBudgets, RankPrompts
from ranking.ranker import RankerFacts, labels_of, save_ranker
from ranking.serving.client import Client
from ranking.serving.stack import open_stack
from ranking.tasks import tasks_of
from ranking.trees import Boosting, grow
from retrieval.data.schema import DAY, TEST, TRAIN, Dataset, Events, Members
from retrieval.data.write import write_dataset
from retrieval.encoder import save_encoder
from retrieval.features import Quantizer
from retrieval.hybrid import HybridError
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

MEMBERS, TOP = 100, 40
SIZE = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)
Start = Callable[..., tuple[int, Callable[[], None]]]


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens
) -> Path:
    """A folder with data, an encoder and the evaluation `out` of its plain, hybrid, shorter and coarser lists."""
    folder = tmp_path_factory.mktemp("measured")
    write_dataset(one_moment(tiny_dataset), folder / "data")
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    torch.manual_seed(5)
    save_encoder(folder / "encoder", new_llama(SIZE, len(tiny_tokens), causal_lm=False), writer, {})
    forms = ["--hybrid", "--hybrid-weights", "1,0.6,0.3", "--dims", "32", "--dims", "16", "--codes", "float16", "--codes", "int8"]
    brewline("evaluate", "retrieval", folder / "data", "--encoder", folder / "encoder", "--without", "all",
             "--out", folder / "out", "--json", *forms)  # fmt: skip
    return folder


def one_moment(tiny: Dataset) -> Dataset:
    """100 members of the tiny shop who all ask at the test cut: the night of that moment knows what every query knows."""
    rng = np.random.default_rng(11)
    cut, rows = tiny.meta.cut_test, []
    for member in range(MEMBERS):
        items = rng.permutation(len(tiny.items))[: rng.integers(3, 14)]
        times = [*np.sort(rng.integers(cut - 12 * DAY, cut, len(items) - 1)).tolist(), cut]
        rows += [(at, member, item) for at, item in zip(times, items.tolist())]
    time, member, item = np.array(sorted(rows), np.int64).T
    none = np.full(len(rows), -1, np.int16)
    events = Events(
        event_id=np.arange(len(rows)), member=member.astype(np.int32), item=item.astype(np.int32), timestamp=time,
        action=np.zeros(len(rows), np.int16), label=np.ones(len(rows), np.int8), value=np.full(len(rows), np.nan, np.float32),
        split=np.where(time < cut, TRAIN, TEST).astype(np.int8), request=none.astype(np.int32), position=none, surface=none,
        actions=("like",),
    )  # fmt: skip
    members = Members(
        [f"m{row}" for row in range(MEMBERS)], {"role": [tiny.members.profile["role"][row % 40] for row in range(MEMBERS)]}
    )
    items_all_there = replace(tiny.items, created_at=np.full(len(tiny.items), cut - 30 * DAY))
    return Dataset(tiny.meta, items_all_there, members, events)


def brewline(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def publish(measured: Path, store: Path, *options: str) -> Path:
    cut = pq.read_table(measured / "out" / "ranked.parquet")["query_timestamp"][0].as_py()
    brewline(
        "nightly", measured / "data", "--encoder", measured / "encoder", "--store", store, "--as-of", cut, "--json", *options
    )
    return store


def assert_served(client: Client, ranked: Path, first_stage: str) -> None:
    rows = pq.read_table(ranked).to_pylist()
    assert len(rows) == MEMBERS
    for row in rows:
        answer = client.retrieve(row["member_id"], TOP)
        assert answer.first_stage == first_stage
        assert answer.ids == row["item_ids"][:TOP], row["member_id"]
        np.testing.assert_allclose(answer.scores, np.array(row["scores"][:TOP], np.float32), atol=1e-5)


def test_dense_and_hybrid_answers_are_the_measured_ones(measured: Path, tmp_path: Path, start: Start) -> None:
    store = publish(measured, tmp_path / "store", "--hybrid", "--hybrid-weights", "1,0.6,0.3")
    for first_stage, folder in (("dense", "."), ("hybrid", "hybrid")):
        stack = open_stack(store, measured / "encoder", None, None, hybrid=first_stage == "hybrid")
        port, stop = start(stack)
        with Client(f"127.0.0.1:{port}") as client:
            assert_served(client, measured / "out" / folder / "ranked.parquet", first_stage)
            assert client.info().first_stage == first_stage
        stop()
    dense, hybrid = (pq.read_table(measured / "out" / folder / "ranked.parquet")["item_ids"] for folder in (".", "hybrid"))
    assert sum(one != other for one, other in zip(dense.to_pylist(), hybrid.to_pylist())) > MEMBERS / 2


@pytest.mark.parametrize(("dims", "codes", "index"), [(32, "float16", "SQfp16"), (32, "int8", "Flat"), (16, "int8", "Flat")])
def test_shorter_and_coarser_answers_are_the_measured_ones(
    measured: Path, tmp_path: Path, start: Start, dims: int, codes: str, index: str
) -> None:
    store = publish(measured, tmp_path / "store", "--dims", str(dims), "--codes", codes)
    port, _ = start(open_stack(store, measured / "encoder", None, None))
    with Client(f"127.0.0.1:{port}") as client:
        told = client.info()
        assert (told.dims, told.codes, told.index) == (dims, codes, index)
        assert_served(client, measured / "out" / f"dual-encoder-{dims}-x-{codes}" / "ranked.parquet", "dense")


def test_a_night_without_the_lists_serves_no_hybrid(measured: Path, tmp_path: Path) -> None:
    store = publish(measured, tmp_path / "store")
    with pytest.raises(HybridError, match="nightly` with --hybrid"):
        open_stack(store, measured / "encoder", None, None, hybrid=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hybrid-weights", "1,1,1"], "--hybrid too"),
        (["--hybrid", "--hybrid-weights", "1,1"], "expected three numbers"),
        (["--dims", "33"], "33"),
        (["--codes", "int4"], "int4"),
    ],
)
def test_forms_that_cannot_be_are_refused(measured: Path, tmp_path: Path, options: list[str], told: str) -> None:
    data, encoder = str(measured / "data"), ["--encoder", str(measured / "encoder")]
    for command in (["evaluate", "retrieval", data, "--without", "all"], ["nightly", data, "--store", str(tmp_path / "store")]):
        done = CliRunner().invoke(app, [*command, *encoder, *options])
        assert done.exit_code != 0
        assert told in done.output + str(done.exception)


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens
) -> Path:
    """A folder with data, an encoder, a ranker of words alone (`text`) and the same with a head that reads all it can."""
    folder = tmp_path_factory.mktemp("judged")
    write_dataset(tiny_dataset, folder / "data")
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    torch.manual_seed(6)
    encoder = save_encoder(folder / "encoder", new_llama(SIZE, len(tiny_tokens), causal_lm=False), writer, {})
    prompts, tasks = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets()), tasks_of(tiny_dataset)
    facts = RankerFacts(tasks, labels_of(tiny_tokens, tasks), RankBudgets(), {}, encoder, {})
    model = new_llama(SIZE, len(tiny_tokens), causal_lm=True)
    pool = training_pool(tiny_dataset, tiny_dataset.meta.cut_test, 4_000, 0)
    rows = FeatureRows(tiny_dataset, tiny_dataset.meta.cut_test, 0.4).of(pool, range(len(pool)))
    trees = grow(rows, pool.label.astype(float), Boosting(trees=30, depth=2))
    blend = Blend(np.array([0.8, 0.1, 0.9, 0.4, 1.5]), -0.3, np.array([0.0, 0.0, 1.0, 0.5, 1.0]), 0.1, 0.2, 0.3)
    save_ranker(folder / "text", model, prompts, facts)
    head = Head(tuple(tiny_dataset.items.numbers), 0.4, trees, Calibrator("platt", 2.0, 0.5, 99), blend)
    save_ranker(folder / "fused", model, prompts, facts, head)
    return folder


@pytest.mark.parametrize(
    ("ranker", "codes", "apart"), [("text", "float32", 1e-5), ("fused", "float32", 1e-5), ("fused", "int8", 5e-3)]
)
def test_ranked_answers_are_the_measured_ones(
    judged: Path, tmp_path: Path, tiny_dataset: Dataset, start: Start, ranker: str, codes: str, apart: float
) -> None:
    data, models = judged / "data", ["--encoder", judged / "encoder", "--ranker", judged / ranker]
    brewline("evaluate", "ranking", data, *models, "--counts", "frozen", "--out", tmp_path / "out", "--json")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["arithmetic"] == "float32"
    cut = tiny_dataset.meta.cut_test
    brewline("nightly", data, *models, "--store", tmp_path / "store", "--as-of", cut, "--codes", codes, "--json")
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    score = dict(zip(scores["event_id"], scores["score"]))
    assert (np.ptp(np.subtract(scores["score"], scores["score_text"])) > 0.05) == (ranker == "fused")
    log, ids = tiny_dataset.events, tiny_dataset.items.item_id
    measured: dict[str, dict[str, float]] = {}
    for event, member, item in zip(log.event_id.tolist(), log.member.tolist(), log.item.tolist()):
        if event in score:
            measured.setdefault(f"m{member}", {})[ids[item]] = score[event]
    port, _ = start(open_stack(tmp_path / "store", judged / "encoder", judged / ranker, None))
    compared = 0
    with Client(f"127.0.0.1:{port}") as client:
        for member, expected in measured.items():
            ranked = client.rank(member, list(expected), task="label")
            np.testing.assert_allclose(ranked.probabilities, [expected[one] for one in ranked.ids], atol=apart)
            recommended = client.recommend(member, 60, task="label")
            both = [(said, expected[one]) for one, said in zip(recommended.ids, recommended.probabilities) if one in expected]
            np.testing.assert_allclose([said for said, _ in both], [right for _, right in both], atol=apart)
            compared += len(both)
    assert len(measured) == 40 and compared > 100


def test_a_head_that_weighs_cosines_is_not_served_with_shorter_vectors(
    judged: Path, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    cut = tiny_dataset.meta.cut_test
    for ranker in ("text", "fused"):
        models = ["--encoder", judged / "encoder", "--ranker", judged / ranker]
        brewline("nightly", judged / "data", *models, "--store", tmp_path / ranker, "--as-of", cut, "--dims", 16, "--json")
    assert open_stack(tmp_path / "text", judged / "encoder", judged / "text", None).encoder.dims == 16
    with pytest.raises(OtherCosines, match=r"vectors are of .*-16"):
        open_stack(tmp_path / "fused", judged / "encoder", judged / "fused", None)
