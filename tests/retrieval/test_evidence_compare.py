"""Saved runs in pairs: the same numbers as in memory, seeds as their mean, and no pairing of different questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ranking.cli.evaluate import app
from retrieval.data.schema import DAY, Dataset
from retrieval.evidence.baselines import ItemNeighbours, Random
from retrieval.evidence.compare import compare, read_run
from retrieval.evidence.evaluate import RetrievalReport, evaluate_retrieval
from retrieval.evidence.popularity import Popularity
from retrieval.evidence.protocol import EvidenceError
from retrieval.evidence.saved import PER_QUERY_FILE, write_report


@pytest.fixture(scope="module")
def report(tiny_dataset: Dataset) -> RetrievalReport:
    return evaluate_retrieval(tiny_dataset, None, "live", [Random(), Popularity(), ItemNeighbours()])


@pytest.fixture(scope="module")
def folder(report: RetrievalReport, tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "run"
    write_report(report, tiny_dataset, path)
    return path


def test_a_saved_pair_says_what_the_pair_in_memory_said(folder: Path, report: RetrievalReport) -> None:
    found = compare([read_run(folder, "Item-kNN")], read_run(folder, "Popularity"))
    ours, theirs = (next(run for run in report.baselines if run.name == name) for name in ("Item-kNN", "Popularity"))
    difference = ours.quality.per_query["ndcg@10"] - theirs.quality.per_query["ndcg@10"]
    lead = found.differences["ndcg@10"]
    np.testing.assert_allclose(lead.value, difference.mean())
    np.testing.assert_allclose(lead.error, difference.std(ddof=1) / np.sqrt(len(difference)))
    assert lead.low < lead.value < lead.high
    assert found.means["mrr"][0].value == pytest.approx(ours.quality.metrics["mrr"].value)
    assert found.members == len(report.queries)


def test_slices_are_paired_too(folder: Path, report: RetrievalReport) -> None:
    found = compare([read_run(folder, "Item-kNN")], read_run(folder, "Popularity"))
    ours, theirs = (next(run for run in report.baselines if run.name == name).quality for name in ("Item-kNN", "Popularity"))
    for name in ("history < 5", "history 5-20", "new members"):
        if ours.slices[name]["n"]:
            expected = ours.slices[name]["recall@10"] - theirs.slices[name]["recall@10"]
            np.testing.assert_allclose(found.slices[name]["recall@10"].value, expected, atol=1e-12)
    cold = ours.cold["recall@10"] - theirs.cold["recall@10"]
    assert 0 < np.isnan(cold).sum() < len(cold)
    np.testing.assert_allclose(found.slices["cold targets"]["recall@10"].value, np.nanmean(cold))
    assert json.dumps(found.as_dict())


def test_several_first_runs_count_as_their_mean(folder: Path) -> None:
    one, two = read_run(folder, "Item-kNN"), read_run(folder, "Random")
    found = compare([one, two], read_run(folder, "Random"))
    alone = compare([one], two)
    assert found.differences["recall@10"].value == pytest.approx(alone.differences["recall@10"].value / 2)
    assert found.runs == 2 and "mean of 2 runs" in found.first
    same = compare([one], one).differences["recall@10"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_order_of_rows_does_not_matter_but_the_queries_do(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.json").write_bytes((folder / "metrics.json").read_bytes())
    table = pq.read_table(folder / PER_QUERY_FILE)
    pq.write_table(table.take(np.arange(len(table))[::-1].copy()), other / PER_QUERY_FILE)
    first = read_run(folder, "Random")
    assert compare([first], read_run(other, "Random")).differences["mrr"].high == 0
    moved = table.to_pydict()
    moved["query_timestamp"] = [moment + 1 for moment in moved["query_timestamp"]]
    pq.write_table(type(table).from_pydict(moved), other / PER_QUERY_FILE)
    with pytest.raises(EvidenceError, match=r"cannot be paired: .* queries"):
        compare([first], read_run(other, "Random"))


def test_runs_of_other_questions_are_refused(folder: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    later = replace(tiny_dataset, meta=replace(tiny_dataset.meta, cut_test=tiny_dataset.meta.cut_test + DAY))
    for name, report in {
        "later": evaluate_retrieval(later, None, "live", [Random()]),
        "valid": evaluate_retrieval(tiny_dataset, None, "live", [Random()], window="valid"),
    }.items():
        write_report(report, tiny_dataset, tmp_path / name)
        with pytest.raises(EvidenceError, match=r"cannot be paired: (cut|window)"):
            compare([read_run(folder, "Random")], read_run(tmp_path / name, "Random"))


def test_what_is_no_run_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="no model, so a system must be named; it holds Item-kNN, Popularity, Random"):
        read_run(folder)
    with pytest.raises(EvidenceError, match="no system 'EASE'"):
        read_run(folder, "EASE")
    with pytest.raises(EvidenceError, match=r"no readable metrics\.json"):
        read_run(tmp_path)
    for hostile in ("[]", "{}", "not json", '{"model": 3}'):
        (tmp_path / "metrics.json").write_text(hostile)
        with pytest.raises(EvidenceError, match=r"no readable metrics\.json"):
            read_run(tmp_path)
    (tmp_path / "metrics.json").write_bytes((folder / "metrics.json").read_bytes())
    table = pq.read_table(folder / PER_QUERY_FILE)
    pq.write_table(table.take(np.zeros(4, np.int64)), tmp_path / PER_QUERY_FILE)
    with pytest.raises(EvidenceError, match="answers a query twice"):
        read_run(tmp_path, "Random")
    (tmp_path / PER_QUERY_FILE).write_bytes(b"PAR1 no")
    with pytest.raises(EvidenceError, match="no readable"):
        read_run(tmp_path, "Random")


def test_the_commands_write_and_compare(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ["baselines", str(tiny_folder), "--window", "valid", "--without", "all", "--with", "knn", "--with", "popularity"]
    done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [run["name"] for run in said["retrieval"]["baselines"]] == ["Popularity", "Item-kNN"]
    run = tmp_path / "retrieval"
    assert "brewline" in (run / "report.html").read_text()
    compared = ["compare", str(run), str(run), "--system", "Item-kNN", "--rival", "Popularity"]
    found = json.loads(CliRunner().invoke(app, [*compared, "--json"]).stdout)
    assert found["metrics"]["recall@10"]["first_minus_second"]["verdict"] in ("better", "worse", "undecided")
    shown = CliRunner().invoke(app, compared)
    assert "Item-kNN (frozen) minus Popularity (frozen)" in shown.stdout.replace("\n", " ")
    refused = CliRunner().invoke(app, ["baselines", str(tmp_path / "nowhere"), "--with", "als"])
    assert isinstance(refused.exception, EvidenceError)
