"""The model in other forms: from the same vectors in one pass, reported apart, never the one to beat."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from index.codes import rounded
from index.fusion import fuse
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, MemberView
from retrieval.evidence.compare import compare, read_run
from retrieval.evidence.evaluate import RetrievalReport, evaluate_retrieval
from retrieval.evidence.forms import CodedForm, HybridForm, coded_forms, form_folder, shortened
from retrieval.evidence.popularity import LivePopularity, Popularity
from retrieval.evidence.protocol import EvidenceError, last_after_cut, member_views
from retrieval.evidence.report import report_table
from retrieval.evidence.saved import write_report
from retrieval.hybrid import HybridSettings, query_words
from retrieval.lexical import Lexical
from retrieval.popular import Popular

DIMS = 12


class Directions:
    """Unit vectors by chance, other ones every day; a member's is that of the newest item."""

    name = "Dual encoder"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def item_vectors(self, day_start: int) -> np.ndarray:
        self.asked.append(day_start)
        return unit(60, day_start // DAY)

    def member_vectors(self, views: Sequence[MemberView]) -> np.ndarray:
        rows = [int(view.history[-1].item.item_id[1:]) for view in views]
        return unit(60, 1)[rows]


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIMS)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def model() -> Directions:
    return Directions()


@pytest.fixture(scope="module")
def report(tiny_dataset: Dataset, model: Directions) -> RetrievalReport:
    forms = [*coded_forms(model.name, DIMS, [DIMS, 4], ["float32", "int8"]), hybrid_of(tiny_dataset)]
    return evaluate_retrieval(tiny_dataset, model, "live", [Popularity(), LivePopularity()], forms=forms)


def hybrid_of(dataset: Dataset) -> HybridForm:
    return HybridForm(dataset, "live", dataset.meta.cut_test, HybridSettings())


def test_each_length_in_each_code_but_not_the_model_itself() -> None:
    listed = coded_forms("Dual encoder", DIMS, [DIMS, 4], ["float32", "int8"])
    assert [form.name for form in listed] == ["Dual encoder, 12 x int8", "Dual encoder, 4 x float32", "Dual encoder, 4 x int8"]
    assert [form.setting for form in listed] == ["12 bytes an item", "16 bytes an item", "4 bytes an item"]
    assert not coded_forms("m", DIMS, [], []) and [form.name for form in coded_forms("m", DIMS, [], ["float16"])] == [
        "m, 12 x float16"
    ]
    with pytest.raises(EvidenceError, match="13"):
        coded_forms("m", DIMS, [13], [])


def test_all_forms_come_from_one_pass(report: RetrievalReport, model: Directions) -> None:
    assert len(model.asked) == len(set(model.asked)), "each night's vectors are made once"
    assert [form.own.name for form in report.apart] == [
        "Dual encoder, 12 x int8", "Dual encoder, 4 x float32", "Dual encoder, 4 x int8", "Hybrid",
    ]  # fmt: skip


def test_coarser_lists_are_those_of_the_rounded_vectors(
    report: RetrievalReport, tiny_dataset: Dataset, model: Directions
) -> None:
    queries = report.queries
    lists = report.apart[2].ranked
    assert lists is not None
    members = shortened(model.member_vectors(member_views(tiny_dataset, queries)), 4)
    for row, day in enumerate(queries.day.tolist()):
        scores = rounded(shortened(model.item_vectors(day * DAY), 4), "int8") @ members[row]
        listed = lists.rows[row][lists.rows[row] >= 0]
        assert sorted([*listed.tolist(), *queries.excluded[row].tolist()]) == list(range(60))
        np.testing.assert_allclose(lists.scores[row][: len(listed)], scores[listed], atol=1e-6)
        assert (np.diff(lists.scores[row][: len(listed)]) <= 0).all()


def test_the_hybrid_merges_what_the_day_knew(report: RetrievalReport, tiny_dataset: Dataset) -> None:
    queries, lists, plain = last_after_cut(tiny_dataset), report.apart[3].ranked, report.ranked
    assert lists is not None and plain is not None
    counts, lexical = Counts.from_dataset(tiny_dataset), Lexical.of_items(tiny_dataset.items)
    for row, view in enumerate(member_views(tiny_dataset, queries)):
        left_out = queries.excluded[row]
        popular = Popular.of_numbers(counts.as_of(int(queries.day[row]) * DAY)).find(60, left_out)
        words = lexical.find(query_words(view, 5), 60, left_out)
        dense = plain.rows[row][plain.rows[row] >= 0].astype(np.int64)
        rows, scores = fuse([dense, words, popular], (1, 0.5, 0.5), 60, 60)
        assert lists.rows[row][: len(rows)].tolist() == rows.tolist() and (lists.rows[row][len(rows) :] == -1).all()
        np.testing.assert_array_equal(lists.scores[row][: len(rows)], scores)


def test_forms_are_reported_apart(report: RetrievalReport, tiny_dataset: Dataset) -> None:
    content = report.as_dict()
    assert content["model"] == evaluate_retrieval(tiny_dataset, Directions(), "live", []).as_dict()["model"], (
        "the headline is the same"
    )
    assert [run["name"] for run in content["baselines"]] == ["Popularity", "Live popularity 7d"]
    assert set(content["best_baseline"].values()) <= {"Popularity", "Live popularity 7d"}
    apart = {form["name"]: form for form in content["apart"]}
    for form in report.apart:
        assert form.best == report.best and form.similarity is None
        told = apart[form.own.name]
        lead = told["metrics"]["recall@10"]["value"] - report.own.quality.metrics["recall@10"].value
        assert told["minus_model"]["recall@10"]["value"] == pytest.approx(lead)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(report_table(report))
    shown = capture.get()
    assert shown.index("Slices") < shown.index("Reported apart") < shown.index("Hybrid")


def test_each_form_is_saved_as_a_run_of_its_own(report: RetrievalReport, tiny_dataset: Dataset, tmp_path: Path) -> None:
    write_report(report, tiny_dataset, tmp_path)
    hybrid = report.apart[3]
    write_report(hybrid, tiny_dataset, tmp_path / form_folder(hybrid.own.name))
    assert json.loads((tmp_path / "hybrid" / "metrics.json").read_text())["model"]["name"] == "Hybrid"
    found = compare([read_run(tmp_path / "hybrid", None)], read_run(tmp_path, None))
    assert found.differences["recall@10"].value == pytest.approx(hybrid.differences["Dual encoder"]["recall@10"].value)
    assert "Dual encoder" in (tmp_path / "hybrid" / "report.html").read_text()


def test_a_frozen_hybrid_counts_before_the_cut(tiny_dataset: Dataset) -> None:
    form = HybridForm(tiny_dataset, "frozen", tiny_dataset.meta.cut_test, HybridSettings(lexical=0.0, popular=1.0))
    report = evaluate_retrieval(tiny_dataset, Directions(), "frozen", [], forms=[form, CodedForm("m", DIMS, "float32")])
    hybrid, same = (one.ranked for one in report.apart)
    assert hybrid is not None and same is not None and report.ranked is not None
    np.testing.assert_array_equal(same.rows, report.ranked.rows)
    early = Popular.of_numbers(Counts.from_dataset(tiny_dataset, tiny_dataset.meta.cut_test).as_of(tiny_dataset.meta.cut_test))
    for row in range(len(report.queries)):
        popular = early.find(60, report.queries.excluded[row])
        dense = report.ranked.rows[row][report.ranked.rows[row] >= 0].astype(np.int64)
        expected = fuse([dense, popular], (1, 1), 60, 60)[0]
        assert hybrid.rows[row][: len(expected)].tolist() == expected.tolist()
