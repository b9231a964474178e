"""Late fusion: the service computes the features of the evaluation; the head joins, explains and survives the disk."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from index.publish import current
from index.snapshot import Snapshot
from ranking.calibrate import Calibrator, sigmoid
from ranking.evaluate import labelled_test_rows
from ranking.evidence import evaluate_ranking
from ranking.fusion import FUSION_FILE, Blend, FusionError, Head, fit_blend
from ranking.fusion_features import COSINE, LABELS, Asked, Facts, asked_of, feature_names, features
from ranking.fusion_rows import LAG_DAYS, FeatureRows, base_rate, training_pool
from ranking.learn.examples import Pool
from ranking.metrics import auc
from ranking.scored import cosines, known_until, moments, retrieval_alone
from ranking.scores import OrderOnly
from ranking.tasks import LABEL
from ranking.trees import Boosting, grow
from retrieval.catalog import Catalog
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder, save_encoder
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.moments import end_of
from retrieval.pooled_rate import POOLED
from retrieval.records import ItemWords, records_of, view_of
from retrieval.refresh import nightly
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer


@pytest.fixture(scope="module")
def night(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens
) -> tuple[Snapshot, Encoder]:
    folder = tmp_path_factory.mktemp("fusion")
    torch.manual_seed(5)
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    size = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)
    save_encoder(folder / "encoder", new_llama(size, len(tiny_tokens), causal_lm=False), writer, {})
    encoder = Encoder.load(folder / "encoder")
    nightly(tiny_dataset, encoder, None, folder / "store", end_of(tiny_dataset))
    path: Path | None = current(folder / "store")
    assert path is not None
    return Snapshot.open(path), encoder


def test_the_service_computes_the_features_of_the_evaluation(tiny_dataset: Dataset, night: tuple[Snapshot, Encoder]) -> None:
    snapshot, encoder = night
    catalog, now = Catalog.open(snapshot), end_of(tiny_dataset)
    static = tuple(tiny_dataset.items.numbers)
    rows = FeatureRows(tiny_dataset, now, 0.4)
    items = np.arange(len(tiny_dataset.items), dtype=np.int64)
    there = catalog.rows([tiny_dataset.items.item_id[row] for row in items])
    items, there = items[there >= 0], there[there >= 0]
    known = 0
    for member, record in enumerate(islice(records_of(tiny_dataset, now), 12)):
        view = view_of(record, ItemWords(tiny_dataset.items))
        cosine = np.asarray(snapshot.vectors[there] @ encoder.members([view])[0], np.float64)
        served = features(asked_of(view, catalog, there, static, cosine), static, 0.4)
        nothing = np.zeros(len(items))
        pool = Pool(
            LABEL,
            np.array([member]),
            np.array([now]),
            np.array([0, len(items)]),
            items,
            np.full(len(items), now // DAY),
            nothing.astype(np.int64),
            nothing.astype(np.int8),
        )
        np.testing.assert_allclose(rows.of(pool, [0], rows.cosines(pool, [0], encoder)), served, rtol=1e-5, atol=1e-5)
        known += len(view.history)
    assert known > 20


def test_an_item_of_the_day_is_taken_for_an_average_one() -> None:
    """Its pooled rate waits for the night. In a log every item has one, so trees would take NaN for the worst there is."""
    known = dict.fromkeys(("n_total", "n_30d", "n_7d", "n_1d", "positive_rate", "age_days"), np.array([3.0, 3.0]))
    facts = Facts({**known, POOLED: np.array([0.9, np.nan])}, ["", ""], ["", ""])
    found = features(Asked(DAY, [], np.zeros(0), facts, np.zeros(2), np.full(2, np.nan)), [], 0.4)
    assert found[:, feature_names([]).index(POOLED)].tolist() == pytest.approx([0.9, 0.4])


def test_features_know_nothing_of_the_moment_itself_or_later(tiny_dataset: Dataset) -> None:
    cut = tiny_dataset.meta.cut_test
    pool = training_pool(tiny_dataset, cut, 10_000, seed=3)
    log = tiny_dataset.events
    lag = log.timestamp[pool.event] - pool.moment
    assert (lag >= 0).all() and (lag > 0).any() and (lag < LAG_DAYS * DAY).all() and (log.timestamp[pool.event] < cut).all()
    whole = FeatureRows(tiny_dataset, cut, 0.5).of(pool, range(len(pool)))
    names = feature_names(tiny_dataset.items.numbers)
    for row in (5, len(pool) // 2, len(pool) - 1):
        past = (log.member == pool.member[row]) & (log.timestamp < pool.moment[row]) & (log.label >= 0)
        engaged = past & tiny_dataset.is_engagement
        assert whole[row, names.index(LABELS)] == engaged.sum()


def test_a_folder_without_a_number_that_the_head_reads_is_refused(tiny_dataset: Dataset) -> None:
    with pytest.raises(FusionError, match="no numbers weight"):
        FeatureRows(tiny_dataset, tiny_dataset.meta.cut_test, 0.5, ["weight"])


NAMES = feature_names(["price"])


def made(n: int = 6_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text logits, features and labels of which text, rate and cosine each know a part."""
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(n, len(NAMES))).astype(np.float32)
    rows[:, NAMES.index(POOLED)] = rng.uniform(0.1, 0.9, n)
    rows[::7, NAMES.index(POOLED)] = np.nan
    rows[:, NAMES.index(LABELS)] = rng.integers(0, 9, n)
    text = rng.normal(size=n)
    rate = np.nan_to_num(rows[:, NAMES.index(POOLED)], nan=0.5)
    logit = 0.8 * text + 2 * (rate - 0.5) + 0.5 * rows[:, NAMES.index(COSINE)] - 0.3
    return text, rows, (rng.random(n) < sigmoid(logit)).astype(np.int8)


@pytest.fixture(scope="module")
def head() -> Head:
    text, rows, label = made()
    without = rows.copy()
    without[:, NAMES.index(COSINE)] = np.nan
    trees = grow(without[:3_000], label[:3_000].astype(float), Boosting(trees=40, depth=2))
    late = slice(3_000, None)
    blend = fit_blend(text[late], trees.logits(without[late]), rows[late], NAMES, 0.5, label[late])
    return Head(("price",), 0.5, trees, Calibrator("platt", 2.0, 0.5, 99), blend)


def test_the_head_beats_each_of_its_parts_and_says_what_the_text_is_worth(head: Head) -> None:
    text, rows, label = made(12_000)
    text, rows, label = (text[6_000:] - 0.5) / 2, rows[6_000:], label[6_000:].astype(float)  # the serving model's own scale
    fused, alone = head.probabilities(text, rows), head.without_text(rows)
    assert auc(label, fused) > max(auc(label, text), auc(label, alone)) + 0.02
    assert fused.mean() == pytest.approx(label.mean(), abs=0.02) and alone.mean() == pytest.approx(label.mean(), abs=0.02)
    assert head.reads_cosine


def test_contributions_sum_to_the_logit_and_move_with_their_cause(head: Head) -> None:
    text, rows, _ = made(300)
    found = head.contributions(text, rows)
    assert set(found) == {"text", "always", *NAMES}
    np.testing.assert_allclose(sum(found.values()), head.logits(text, rows), atol=1e-10)
    assert np.corrcoef(found["text"], text)[0, 1] > 0.9
    assert np.corrcoef(found[COSINE], rows[:, NAMES.index(COSINE)])[0, 1] > 0.99


def test_an_unknown_cosine_counts_as_an_average_one(head: Head) -> None:
    text, rows, _ = made(200)
    unknown, average = rows.copy(), rows.copy()
    unknown[:, NAMES.index(COSINE)], average[:, NAMES.index(COSINE)] = np.nan, head.blend.centre
    np.testing.assert_allclose(head.logits(text, unknown), head.logits(text, average), atol=1e-6)


def test_the_disk_changes_nothing_and_damage_is_refused(head: Head, tmp_path: Path) -> None:
    head.save(tmp_path)
    text, rows, _ = made(100)
    np.testing.assert_array_equal(Head.load(tmp_path).probabilities(text, rows), head.probabilities(text, rows))
    with pytest.raises(FusionError, match="reads 20 features of 100 candidates"):
        head.logits(text, rows[:, 1:])
    held = json.loads((tmp_path / FUSION_FILE).read_text())
    for broken, message in (
        ({**held, "format": 1}, "format 1, this version reads 2; train the ranker again"),
        ({**held, "base": 2}, "base is 2"),
        ({"format": 2}, "not a head"),
    ):
        (tmp_path / FUSION_FILE).write_text(json.dumps(broken))
        with pytest.raises(FusionError, match=message):
            Head.load(tmp_path)
    with pytest.raises(FusionError, match="not finite"):
        Blend.from_facts({**head.blend.facts(), "bias": float("nan")})


def test_the_base_rate_ends_at_its_time(tiny_dataset: Dataset) -> None:
    log = tiny_dataset.events
    cut = tiny_dataset.meta.cut_valid
    assert base_rate(tiny_dataset, cut) == pytest.approx(log.label[(log.label >= 0) & (log.timestamp < cut)].mean())
    assert base_rate(tiny_dataset, 0) == 0.5


def test_retrieval_alone_is_a_baseline_in_the_order_of_its_cosines(
    tiny_dataset: Dataset, night: tuple[Snapshot, Encoder]
) -> None:
    rows, encoder = labelled_test_rows(tiny_dataset), night[1]
    pool, back = moments(tiny_dataset, rows, "live")
    cosine = cosines(tiny_dataset, pool, known_until(tiny_dataset, "live"), encoder)[back]
    found = retrieval_alone(tiny_dataset, cosine, encoder, "live")
    assert found.name == "Retrieval score" and found.probability.shape == (len(rows),)
    assert ((found.probability > 0) & (found.probability < 1)).all()
    assert (np.diff(found.probability[np.argsort(cosine)]) >= 0).all() and np.ptp(cosine) > 0


def test_cosines_are_no_probabilities_unless_unseen_labels_say_so(
    tiny_dataset: Dataset, night: tuple[Snapshot, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, rows, encoder = tiny_dataset.meta, labelled_test_rows(tiny_dataset), night[1]
    pool, back = moments(tiny_dataset, rows, "live")
    cosine = cosines(tiny_dataset, pool, known_until(tiny_dataset, "live"), encoder)[back]
    monkeypatch.setattr("ranking.scored.fit", lambda said, _: Calibrator("platt", 3.0, -1.0, len(said)))
    found = {}
    for cut in (DAY, meta.cut_test):
        monkeypatch.setattr(encoder, "facts", {**encoder.facts, "training": {"data": meta.name, "cut": cut, "note": ""}})
        one = retrieval_alone(tiny_dataset, cosine, encoder, "live")
        found[cut] = evaluate_ranking(tiny_dataset, rows, [one], "live").baselines[0].judged
    blind, knowing = found[DAY].metrics, found[meta.cut_test].metrics
    assert blind["log_loss"] > 0 and np.isnan(knowing["log_loss"]) and np.isnan(knowing["calibration_error_debiased"])
    for order in ("auc", "member_auc", "member_ndcg@10"):
        assert knowing[order] == pytest.approx(blind[order], abs=1e-3)
    assert np.isnan(found[meta.cut_test].slices["both known"]["mean_prediction"])
    monkeypatch.setattr("ranking.scored.fit", lambda said, _: Calibrator(n=len(said)))
    monkeypatch.setattr(encoder, "facts", {})
    assert isinstance(retrieval_alone(tiny_dataset, cosine, encoder, "live"), OrderOnly)
