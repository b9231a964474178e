"""Calibrators recover what distorted the logits, never reverse an order, and survive the disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranking.calibrate import CalibrationError, Calibrator, auc, calibration_error, fit, sigmoid


def drawn(a: float, b: float, n: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, n).astype(np.float32)
    return logits, (rng.random(n) < sigmoid(a * logits + b)).astype(np.int8)


def test_platt_recovers_scale_and_shift() -> None:
    logits, labels = drawn(0.4, -1.5)
    found = fit(logits, labels)
    assert found.a == pytest.approx(0.4, abs=0.03) and found.b == pytest.approx(-1.5, abs=0.05)
    assert calibration_error(found.probabilities(logits), labels) < 0.01 < calibration_error(sigmoid(logits), labels)
    assert found.probabilities(logits).mean() == pytest.approx(labels.mean(), abs=1e-3)


def test_temperature_keeps_the_middle_in_place() -> None:
    found = fit(*drawn(0.4, 0.0), method="temperature")
    assert found.b == 0 and found.a == pytest.approx(0.4, abs=0.03)


def test_isotonic_follows_a_bend_that_platt_cannot_and_survives_the_disk() -> None:
    rng = np.random.default_rng(1)
    logits = rng.uniform(-3, 3, 20_000)
    labels = (rng.random(20_000) < np.where(logits < 0, 0.2, np.where(logits < 1, 0.3, 0.9))).astype(np.int8)
    found = fit(logits, labels, "isotonic")
    assert (
        calibration_error(found.probabilities(logits), labels)
        < 0.025
        < calibration_error(fit(logits, labels).probabilities(logits), labels)
    )
    assert (np.diff(found.probabilities(np.linspace(-9, 9, 500))) >= 0).all()
    assert Calibrator.from_facts(json.loads(json.dumps(found.facts()))) == found
    for wrong in ([[0, 0.5], [1, 0.2]], [[0, 2.0]], [], [[float("nan"), 0.5]]):
        with pytest.raises(CalibrationError):
            Calibrator.from_facts({**found.facts(), "knots": wrong})


def test_equal_logits_are_one_step_in_whatever_order_their_labels_come() -> None:
    half = np.repeat([0, 1], 100)
    for labels in (half, half[::-1], np.tile([0, 1], 100)):
        assert fit(np.zeros(200), labels, "isotonic").knots == ((0.0, pytest.approx(0.5)),)
    rng = np.random.default_rng(3)
    logits = np.round(2 * rng.normal(size=4_000)) / 2
    labels = (rng.random(4_000) < sigmoid(logits)).astype(int)
    shuffled, found = rng.permutation(4_000), fit(logits, labels, "isotonic")
    assert fit(logits[shuffled], labels[shuffled], "isotonic") == found
    assert calibration_error(found.probabilities(logits), labels, bins=1) < 1e-3
    for value in (-1.0, 0.0, 1.0):  # rates of some hundred answers each: they rise, so nothing is pooled
        held = logits == value
        assert found.probabilities(np.array([value]))[0] == pytest.approx(labels[held].mean(), abs=5e-3)


def test_isotonic_pools_what_falls_and_equals_scikit_learn_before_smoothing() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=5_000), rng.integers(0, 2, 5_000)
    labels = (rng.random(5_000) < sigmoid(2 * logits)).astype(np.int8)
    expected = isotonic.IsotonicRegression(out_of_bounds="clip").fit(logits, labels).predict(logits)
    np.testing.assert_allclose(fit(logits, labels, "isotonic").probabilities(logits), expected, atol=0.12)
    assert np.abs(fit(logits, labels, "isotonic").probabilities(logits) - expected).mean() < 0.015


@pytest.mark.parametrize("positives", [0, 5])
def test_too_few_answers_fit_nothing(positives: int) -> None:
    labels = np.zeros(100, np.int8)
    labels[:positives] = 1
    assert fit(np.linspace(-1, 1, 100), labels).method == "identity"


def test_an_order_is_never_reversed_and_separable_data_stay_finite() -> None:
    logits, labels = drawn(-1.0, 0.0, 2_000)
    assert fit(logits, labels).method == "identity"
    found = fit(np.repeat([-3.0, 3.0], 50), np.repeat([0, 1], 50))
    assert found.method == "platt" and 0 < found.a < 100


def test_a_logit_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CalibrationError, match="1 of 3"):
        fit(np.array([0.0, np.nan, 1.0]), np.array([0, 1, 1]))


def test_facts_round_trip_through_json_and_bad_ones_are_refused() -> None:
    found = fit(*drawn(0.7, 0.2, 2_000))
    assert Calibrator.from_facts(json.loads(json.dumps(found.facts()))) == found
    for wrong in ({}, {**found.facts(), "a": -1.0}, {**found.facts(), "b": float("nan")}, {**found.facts(), "method": "magic"}):
        with pytest.raises(CalibrationError):
            Calibrator.from_facts(wrong)


def test_probabilities_of_huge_logits_stay_in_range() -> None:
    p = Calibrator("platt", 2.0, 1.0, 9).probabilities(np.array([-1e30, -1e3, 0, 1e3, 1e30], np.float32))
    assert p.dtype == np.float32 and np.isfinite(p).all() and p[0] == 0 and p[-1] == 1


def test_calibration_error_by_hand() -> None:
    # Two bins of two: |.15 - .5| and |.85 - 1|, each half of the mass.
    assert calibration_error(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 1, 1, 1]), bins=2) == pytest.approx(0.25)
    assert np.isnan(calibration_error(np.zeros(0), np.zeros(0, int)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=12))
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, int]]) -> None:
    scores, labels = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    found = auc(scores, labels)
    assert np.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


def test_labels_above_one_leave_isotonic_a_probability_that_survives_the_disk() -> None:
    """Labels as expected at the mean place are 1 over a share, so they can be more than 1."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=400)
    found = fit(logits, np.where(rng.random(400) < 1 / (1 + np.exp(-3 * logits)), 1.4, 0.0), "isotonic")
    assert 0.9 < found.probabilities(np.array([9.0]))[0] < 1 and Calibrator.from_facts(found.facts()) == found
