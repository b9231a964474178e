"""Symmetric trees: they find what decides, explain it exactly, and survive the disk; damaged ones are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ranking.metrics import auc
from ranking.trees import Boosting, Trees, TreesError, grow

SMALL = Boosting(trees=60, depth=3)


def puzzle(n: int = 4_000) -> tuple[np.ndarray, np.ndarray]:
    """The label is an exclusive or of two columns, and unknown third ones are mostly positive; two more columns say nothing."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 5)).astype(np.float32)
    rows[rng.random(n) < 0.2, 2] = np.nan
    rows[:, 4] = np.nan
    label = ((rows[:, 0] > 0) ^ (rows[:, 1] > 0.3)) | np.isnan(rows[:, 2])
    return rows, np.where(rng.random(n) < 0.05, ~label, label).astype(np.float64)


@pytest.fixture(scope="module")
def grown() -> Trees:
    return grow(*puzzle(), SMALL)


def test_interactions_and_unknown_values_are_learned(grown: Trees) -> None:
    rows, label = puzzle(8_000)
    fresh = slice(4_000, None)
    assert auc(label[fresh], grown.logits(rows[fresh])) > 0.93
    assert set(np.unique(grown.feature)) <= {0, 1, 2, 3}  # a column without any number asks nothing


def test_shares_sum_to_the_logit_and_name_the_cause(grown: Trees) -> None:
    rows, _ = puzzle()
    shares = grown.shares(rows)
    np.testing.assert_allclose(shares.sum(1) + grown.expectation, grown.logits(rows), atol=1e-12)
    assert np.abs(shares[:, 0]).mean() > 5 * np.abs(shares[:, 3]).mean()
    assert shares[np.isnan(rows[:, 2]), 2].mean() > 0.3


def test_the_same_rows_give_the_same_trees_and_the_disk_changes_nothing(grown: Trees) -> None:
    again = grow(*puzzle(), SMALL)
    assert again.facts() == grown.facts()
    loaded = Trees.from_facts(json.loads(json.dumps(grown.facts())), 5)
    rows, _ = puzzle()
    np.testing.assert_array_equal(loaded.logits(rows), grown.logits(rows))
    assert grown.logits(rows[:0]).shape == (0,) and grown.shares(rows[:0]).shape == (0, 5)


def test_trees_are_calibrated_where_they_learned(grown: Trees) -> None:
    rows, label = puzzle()
    assert (1 / (1 + np.exp(-grown.logits(rows)))).mean() == pytest.approx(label.mean(), abs=0.01)


def test_damaged_trees_are_refused(grown: Trees) -> None:
    facts = grown.facts()
    wrong = [
        ({}, "need base"),
        ({**facts, "leaf": facts["leaf"][:-1]}, "do not fit"),
        ({**facts, "feature": (np.asarray(facts["feature"]) + 5).tolist()}, r"outside 0\.\.4"),
        ({**facts, "leaf": np.full_like(grown.leaf, np.nan).tolist()}, "not finite"),
        ({**facts, "threshold": [[1.0], [1.0, 2.0]]}, "need base"),
    ]
    for broken, message in wrong:
        with pytest.raises(TreesError, match=message):
            Trees.from_facts(broken, 5)
