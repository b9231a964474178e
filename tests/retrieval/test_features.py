"""Numbers to words: boundaries, extremes, and a file that says when it is not one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval.features import LOG_BUCKETS, MISSING, Quantizer, QuantizerError


def test_percentile_buckets_are_percentiles() -> None:
    quantizer = Quantizer.fit({"views": np.arange(10_000.0)})
    buckets = quantizer.bucket("views", np.array([0.0, 49.0, 5_000.0, 9_999.0]))
    assert buckets.tolist() == [1, 1, 51, 100]
    assert np.bincount(quantizer.bucket("views", np.arange(10_000.0)))[1:].tolist() == [100] * 100


@pytest.mark.parametrize("kind", ["percentile", "log"])
def test_buckets_rise_with_the_value_and_extremes_are_defined(kind: str) -> None:
    quantizer = Quantizer.fit({"n": np.array([0.0, 1, 2, 5, 100, 10_000])}, kind)  # type: ignore[arg-type]
    values = np.array([-np.inf, -3, 0, 1, 7, 1e12, np.inf])
    buckets = quantizer.bucket("n", values)
    assert (np.diff(buckets) >= 0).all() and buckets[0] == 1 and buckets[-1] == quantizer.n_buckets
    assert quantizer.bucket("n", np.array([np.nan])).tolist() == [MISSING]


def test_log_buckets_resolve_a_heavy_head_that_percentiles_merge() -> None:
    values = np.concatenate([np.zeros(9_950), np.arange(1.0, 51.0)])
    head = np.array([10.0, 20.0, 40.0])
    assert len(set(Quantizer.fit({"n": values}).bucket("n", head).tolist())) < 3
    log = Quantizer.fit({"n": values}, "log").bucket("n", head)
    assert len(set(log.tolist())) == 3 and log.max() < LOG_BUCKETS


def test_words_of_each_kind() -> None:
    values = {"n": np.arange(1_000.0)}
    seen = np.array([500.0, np.nan])
    assert Quantizer.fit(values).words("n", seen) == [("<|n:51|>", ""), ("<|n:none|>", "")]
    assert Quantizer.fit(values, "percentile_text").words("n", seen) == [("<|n|>", "51"), ("<|n|>", "")]
    assert Quantizer.fit(values, "raw").words("n", np.array([1234567.0, np.nan])) == [("<|n|>", "1.23457e+06"), ("<|n|>", "")]


@pytest.mark.parametrize("kind", ["percentile", "log", "raw", "percentile_text"])
def test_every_word_is_among_the_tokens_and_survives_a_round_trip(kind: str, tmp_path: Path) -> None:
    quantizer = Quantizer.fit({"a": np.arange(50.0), "empty": np.full(3, np.nan)}, kind)  # type: ignore[arg-type]
    quantizer.save(tmp_path / "q.json")
    again = Quantizer.load(tmp_path / "q.json")
    values = np.array([np.nan, -1, 0, 17.3, 1e9, np.inf])
    for name in ("a", "empty"):
        assert again.words(name, values) == quantizer.words(name, values)
        assert {token for token, _ in quantizer.words(name, values)} <= set(quantizer.tokens())
    again.save(tmp_path / "again.json")
    assert (tmp_path / "q.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_a_field_that_was_never_fitted_is_an_error_and_a_torn_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuantizerError, match="'price' was not fitted; known fields: a"):
        Quantizer.fit({"a": np.ones(3)}).bucket("price", np.ones(1))
    (tmp_path / "q.json").write_text('{"kind": "perc')
    with pytest.raises(QuantizerError, match=r"q\.json"):
        Quantizer.load(tmp_path / "q.json")
