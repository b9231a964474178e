"""Ranking metrics against scikit-learn and by hand; baselines that cannot see the future; files of the report."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ranking.baselines import ExtraMissing, Scored, as_of_days, oracle, simple_rankers
from ranking.evaluate import (
    RankingEvidenceError,
    auc_difference,
    auc_samples,
    engaged_before,
    judge_scores,
    labelled_test_rows,
    masks_of,
    member_ndcg,
    request_ndcg,
    slice_leads,
)
from ranking.evidence import WITHOUT_TEXT, evaluate_ranking, gains_table, write_ranking_report
from ranking.features import FeatureTable
from ranking.metrics import (
    auc,
    calibration_error,
    debiased_calibration_error,
    log_loss,
    member_aucs,
    ndcg_within,
    normalized_entropy,
    reliability,
)
from ranking.scores import Scores
from retrieval.data.schema import DAY, TEST, Dataset
from retrieval.evidence.intervals import Estimate

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def noisy(seed: int, size: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, size).astype(float)
    score = np.round(np.clip(0.3 * label + 0.7 * rng.random(size), 0.01, 0.99), 1)
    return label, score, rng.integers(0, 40, size)


def test_auc_and_log_loss_equal_scikit_learn_also_with_ties() -> None:
    label, score, member = noisy(0)
    assert auc(label, score) == pytest.approx(sklearn_metrics.roc_auc_score(label, score))
    assert log_loss(label, score) == pytest.approx(sklearn_metrics.log_loss(label, score))
    within, weight = member_aucs(label, score, member)
    expected = [sklearn_metrics.roc_auc_score(label[member == who], score[member == who]) for who in np.unique(member)]
    np.testing.assert_allclose(within, expected)
    assert weight.sum() == len(label)


def test_members_with_one_label_have_no_auc() -> None:
    within, weight = member_aucs(np.array([1.0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([7, 7, 9, 9]))
    assert within.tolist() == [1.0]
    assert weight.tolist() == [2.0]
    assert np.isnan(auc(np.ones(3), np.zeros(3)))


def test_calibration_and_entropy_by_hand() -> None:
    label = np.array([0.0, 1, 1, 1])
    assert calibration_error(label, np.array([0.2, 0.8, 0.8, 0.8]), bins=2) == pytest.approx(0.5 * 0 + 0.5 * 0.2)
    assert normalized_entropy(label, np.full(4, 0.75)) == pytest.approx(1)
    assert normalized_entropy(label, np.array([0.1, 0.9, 0.9, 0.9])) < 1


def test_bootstrap_weights_equal_recomputing_the_auc_on_the_drawn_rows(tiny_dataset: Dataset) -> None:
    rows = labelled_test_rows(tiny_dataset)
    score = np.random.default_rng(3).integers(0, 5, len(rows)) / 5
    samples = auc_samples(rows, score, seed=4, resamples=3)
    members, code = np.unique(rows.member, return_inverse=True)
    rng = np.random.default_rng(4)
    draws = rng.integers(0, len(members), (3, len(members)))
    for sample, drawn in zip(samples, draws, strict=True):
        taken = np.concatenate([np.flatnonzero(code == who) for who in drawn])
        assert sample == pytest.approx(auc(rows.label[taken], score[taken]))


def test_reliability_and_ndcg_equal_scikit_learn() -> None:
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(1)
    score = rng.random(3_000)
    label = (rng.random(3_000) < score).astype(float)
    happened, said = calibration_curve(label, score, n_bins=15, strategy="quantile")
    found = reliability(label, score)
    np.testing.assert_allclose(found[0], said, atol=1e-3)
    np.testing.assert_allclose(found[1], happened, atol=1e-2)
    group = rng.integers(0, 30, 3_000)
    expected = [
        sklearn_metrics.ndcg_score(label[None, group == one], score[None, group == one], k=10) for one in np.unique(group)
    ]
    assert ndcg_within(group, label, score, 10) == pytest.approx(np.mean(expected))


def test_chance_alone_is_taken_off_the_calibration_error_and_a_real_gap_stays() -> None:
    rng = np.random.default_rng(2)
    plain, debiased, shifted = [], [], []
    for _ in range(40):
        score = rng.random(1_500)
        label = (rng.random(1_500) < score).astype(float)
        plain.append(calibration_error(label, score))
        debiased.append(debiased_calibration_error(label, score))
        shifted.append(debiased_calibration_error(label, np.clip(score + 0.1, 0, 1)))
    assert np.mean(debiased) < 0.7 * np.mean(plain)
    assert np.mean(shifted) == pytest.approx(0.095, abs=0.01)


def test_slices_are_those_of_a_hand_count(tiny_dataset: Dataset) -> None:
    rows, log, engaged = labelled_test_rows(tiny_dataset), tiny_dataset.events, tiny_dataset.engagements
    masks = masks_of(rows)
    impressions = 0
    for row in (0, len(rows) // 2, len(rows) - 1):
        moment = log.timestamp[rows.event[row]]
        assert rows.history[row] == ((engaged.member == rows.member[row]) & (engaged.timestamp < moment)).sum()
        impressions += int(((log.member == rows.member[row]) & (log.timestamp < moment)).sum()) - int(rows.history[row])
    assert impressions > 0
    assert sum(mask.sum() for name, mask in masks.items() if name.startswith("history")) == len(rows)
    assert sum(mask.sum() for name, mask in masks.items() if name.startswith("week")) == len(rows)
    assert rows.week.min() == 0 and 0 < member_ndcg(rows, rows.label) <= 1


def test_frozen_slices_count_the_history_that_a_frozen_prompt_holds(
    tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranking.evaluate.HISTORIES", (0, 12))
    rows, engaged = labelled_test_rows(tiny_dataset), tiny_dataset.engagements
    known = np.bincount(engaged.member[engaged.timestamp < tiny_dataset.meta.cut_test], minlength=len(tiny_dataset.members))
    found = {
        counts: evaluate_ranking(tiny_dataset, rows, [Scored("Base rate", "frozen", np.full(len(rows), 0.5))], counts)
        for counts in ("live", "frozen")
    }
    live, frozen = ({name: each["n"] for name, each in one.baselines[0].judged.slices.items()} for one in found.values())
    assert frozen["history 12+"] == (known[rows.member] >= 12).sum() < live["history 12+"] == (rows.history >= 12).sum()
    assert (engaged_before(tiny_dataset, rows.member, np.zeros(len(rows), np.int64)) == 0).all()


@pytest.mark.parametrize(
    ("low", "high", "told"), [(0.006, 0.02, "carry"), (0.001, 0.03, "not shown"), (-0.01, 0.004, "disguise"), (None, None, "not")]
)
def test_the_verdict_on_the_words_heeds_its_interval(tiny_dataset: Dataset, low: float, high: float, told: str) -> None:
    rows = labelled_test_rows(tiny_dataset)
    report = evaluate_ranking(tiny_dataset, rows, [], "live")
    value = np.nan if low is None else low
    lost = Estimate(0.01, 0.005, value, np.nan if high is None else high)
    verdict = replace(report, fusion={WITHOUT_TEXT: lost}).verdict
    assert [word for word in ("carry", "disguise", "not shown") if word in verdict] == ["not shown" if told == "not" else told]


def test_a_paired_difference_sees_a_small_steady_lead(tiny_dataset: Dataset) -> None:
    rows = labelled_test_rows(tiny_dataset)
    rng = np.random.default_rng(0)
    noise = rng.random(len(rows))
    worse = judge_scores(rows, 0.4 * noise + 0.3 * rows.label * (rng.random(len(rows)) < 0.7))
    better = judge_scores(rows, 0.4 * noise + 0.3 * rows.label)
    lead = auc_difference(better, worse)
    assert lead.low > 0
    assert auc_difference(better, better).high == 0


def test_the_gain_of_a_slice_is_that_of_its_rows_alone_and_stands_in_every_output(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranking.evaluate.HISTORIES", (0, 14))
    rows, rng = labelled_test_rows(tiny_dataset), np.random.default_rng(5)
    short, noise = rows.history < 14, rng.random(len(rows))
    ours, theirs = np.where(short, 0.3 * rows.label + 0.6 * noise, noise), rng.permutation(noise)
    found = slice_leads(rows, ours, theirs, resamples=200)
    name = "history 0-13"
    value = sklearn_metrics.roc_auc_score(rows.label[short], ours[short])
    value -= sklearn_metrics.roc_auc_score(rows.label[short], theirs[short])
    assert found[name].value == pytest.approx(value) and 0 < found[name].low < value < found[name].high
    assert found["history 14+"].low < 0 and "cold members" not in found
    baselines = [Scored("Guess", "frozen", theirs), Scored("Base rate", "frozen", np.full(len(rows), 0.5))]
    report = evaluate_ranking(tiny_dataset, rows, baselines, "live", Scores(ours, ours))
    assert report.best == "Guess, frozen" and report.gains["Ranker"][name].value == pytest.approx(value)
    told = report.as_dict()["auc_minus_best_by_slice"]
    assert isinstance(told, dict) and told["Ranker"][name]["value"] == pytest.approx(value)
    assert name in list(gains_table(report).columns[0].cells)
    write_ranking_report(report, rows, Scores(ours, ours), tmp_path)
    words = evaluate_ranking(tiny_dataset, rows, baselines, "live", Scores(ours, theirs, theirs)).gains["Ranker, text only"]
    assert words[name].value == words[name].low == words[name].high == 0
    assert f"{found[name].value:+.4f}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_request_ndcg_by_hand_and_ties_do_not_leak_the_position(tiny_dataset: Dataset) -> None:
    rows = labelled_test_rows(tiny_dataset)
    assert request_ndcg(rows, rows.label) == 1
    three = replace(
        rows,
        label=np.array([0.0, 1, 0]),
        request=np.array([5, 5, -1], np.int32),
        **{
            name: getattr(rows, name)[:3]
            for name in ("event", "event_id", "member", "item", "cold_member", "cold_item", "history", "week")
        },
    )
    assert request_ndcg(three, np.array([0.9, 0.1, 0.5])) == pytest.approx(1 / np.log2(3))
    assert np.isnan(request_ndcg(replace(three, request=np.full(3, -1, np.int32)), np.zeros(3)))


def test_scores_that_are_no_probabilities_are_refused(tiny_dataset: Dataset) -> None:
    rows = labelled_test_rows(tiny_dataset)
    for wrong in (np.full(len(rows), 1.5), np.full(len(rows), np.nan), np.zeros(3)):
        with pytest.raises(RankingEvidenceError, match="probabilities"):
            judge_scores(rows, wrong)
    silent = replace(tiny_dataset, events=replace(tiny_dataset.events, label=np.full(len(tiny_dataset.events), -1, np.int8)))
    with pytest.raises(RankingEvidenceError, match="0 labelled test events"):
        labelled_test_rows(silent)


def test_features_of_a_day_do_not_change_with_what_happens_on_it_or_later(tiny_dataset: Dataset) -> None:
    log = tiny_dataset.events
    event = np.flatnonzero(log.split == TEST)[:200]
    day = np.full(len(event), tiny_dataset.meta.cut_test // DAY)
    early = log.timestamp < tiny_dataset.meta.cut_test
    flipped = replace(log, label=np.where(early, log.label, 1 - log.label).astype(np.int8))
    before = FeatureTable(tiny_dataset).features(event, day)
    after = FeatureTable(replace(tiny_dataset, events=flipped)).features(event, day)
    np.testing.assert_array_equal(before, after)
    assert np.isfinite(before).all()


def test_rates_by_hand(tiny_dataset: Dataset) -> None:
    log = tiny_dataset.events
    day = tiny_dataset.meta.cut_test // DAY
    table = FeatureTable(tiny_dataset)
    rate, count = table.rate("item", np.array([3]), np.array([day]))
    own = log.label[(log.item == 3) & (log.label >= 0) & (log.timestamp < day * DAY)]
    assert count[0] == len(own)
    assert rate[0] == pytest.approx((own.sum() + 5 * table.base_rate) / (len(own) + 5))


def test_classifiers_find_the_own_topic_and_the_oracle_is_aligned_by_event(tiny_dataset: Dataset) -> None:
    rows = labelled_test_rows(tiny_dataset)

    class Truth:
        event = rows.event_id[::-1].copy()
        p_label = rows.label[::-1] * 0.98 + 0.01

    scored = {(one.name, one.knowledge): one.probability for one in simple_rankers(tiny_dataset, rows, Truth())}
    assert auc(rows.label, scored["Oracle", "live"]) == 1
    assert auc(rows.label, scored["Logistic regression", "live"]) > 0.9 > 0.7 > auc(rows.label, scored["Item rate", "live"])
    report = evaluate_ranking(tiny_dataset, rows, [], "live", Scores(*[scored["Gradient boosting", "live"]] * 2))
    assert report.best == ""

    class Stranger:
        event = rows.event_id[1:]
        p_label = rows.label[1:]

    with pytest.raises(Exception, match="does not know 1 of"):
        oracle(rows, Stranger())


def test_without_scikit_learn_one_line_says_what_to_install(tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'brewline\[evaluate\]'"):
        simple_rankers(tiny_dataset, labelled_test_rows(tiny_dataset))


def test_frozen_knowledge_ends_at_the_cut_and_live_at_the_start_of_the_day(tiny_dataset: Dataset) -> None:
    rows = labelled_test_rows(tiny_dataset)
    assert set(as_of_days(tiny_dataset, rows, "frozen")) == {tiny_dataset.meta.cut_test // DAY}
    np.testing.assert_array_equal(as_of_days(tiny_dataset, rows, "live"), tiny_dataset.events.day[rows.event])


def test_scores_parquet_has_every_labelled_event(tiny_dataset: Dataset, tmp_path: Path) -> None:
    rows = labelled_test_rows(tiny_dataset)
    probability = np.linspace(0.1, 0.9, len(rows))
    report = evaluate_ranking(tiny_dataset, rows, [], "live", Scores(probability, probability))
    write_ranking_report(report, rows, Scores(probability, 1 - probability), tmp_path)
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["event_id", "score", "score_text"]
    log = tiny_dataset.events
    assert table["event_id"].to_pylist() == log.event_id[(log.split == TEST) & (log.label >= 0)].tolist()
    assert (tmp_path / "metrics.json").stat().st_size > 100
