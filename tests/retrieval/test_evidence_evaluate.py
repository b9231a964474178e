"""A model as vectors: days, history and leads are handled as the protocol says; the files hold what the table shows."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from retrieval.data.schema import DAY, Dataset, MemberView
from retrieval.evidence.baselines import ItemNeighbours, Random
from retrieval.evidence.choice import choose_baselines
from retrieval.evidence.evaluate import evaluate_retrieval
from retrieval.evidence.popularity import LivePopularity, Popularity
from retrieval.evidence.protocol import EvidenceError, last_after_cut
from retrieval.evidence.report import report_table
from retrieval.evidence.saved import write_report
from retrieval.records import ItemWords, records_of, view_of


class TopicModel:
    """Members and items are the one-hot vectors of their topic; remembers what it was asked."""

    name = "Topics"

    def __init__(self, items: int = 60) -> None:
        self.items = items
        self.moments: list[int] = []
        self.views: list[MemberView] = []

    def item_vectors(self, day_start: int) -> np.ndarray:
        self.moments.append(day_start)
        return np.eye(4, dtype=np.float32)[np.arange(self.items) % 4]

    def member_vectors(self, views: Sequence[MemberView]) -> np.ndarray:
        self.views += views
        return np.eye(4, dtype=np.float32)[[int(view.member.member_id[1:]) % 4 for view in views]]


BASELINES = [Random(), Popularity(), ItemNeighbours()]


def test_live_rebuilds_the_items_once_per_day_and_frozen_once_at_the_cut(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    live, frozen = TopicModel(), TopicModel()
    evaluate_retrieval(tiny_dataset, live, "live", BASELINES)
    evaluate_retrieval(tiny_dataset, frozen, "frozen", BASELINES)
    assert live.moments == sorted({int(day) * DAY for day in queries.day})
    assert frozen.moments == [tiny_dataset.meta.cut_test]


def test_views_end_strictly_before_the_query(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    moment = dict(zip((f"m{row}" for row in queries.member), queries.timestamp.tolist(), strict=True))
    model = TopicModel()
    evaluate_retrieval(tiny_dataset, model, "live", BASELINES)
    assert len(model.views) == len(queries)
    for view in model.views:
        times = [entry.timestamp for entry in view.history]
        assert times == sorted(times)
        assert times[-1] < moment[view.member.member_id]
        assert view.connections


def test_views_are_those_that_serving_would_show(tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.records.NEWEST", 3)
    queries, model, words = last_after_cut(tiny_dataset), TopicModel(), ItemWords(tiny_dataset.items)
    evaluate_retrieval(tiny_dataset, model, "live", [])
    asked = {f"m{row}": moment for row, moment in zip(queries.member.tolist(), queries.timestamp.tolist())}
    for view in model.views[::5]:
        name = view.member.member_id
        record = next(one for one in records_of(tiny_dataset, asked[name]) if one.member.member_id == name)
        served = view_of(record, words)
        assert list(view.history) == list(served.history) and len(view.history) == 3
        assert list(view.connections) == list(served.connections)


def test_a_model_that_knows_the_topics_beats_chance_and_popularity(tiny_dataset: Dataset, tmp_path: Path) -> None:
    report = evaluate_retrieval(tiny_dataset, TopicModel(), "frozen", BASELINES)
    assert report.model is not None
    assert report.ranked is not None
    queries = report.queries
    assert ((report.ranked.rows[:, :3] % 4) == (queries.member % 4)[:, None]).mean() > 0.9
    assert report.differences["Random"]["recall@10"].low > 0
    assert report.best["recall@10"] == "Item-kNN"
    write_report(report, tiny_dataset, tmp_path / "new" / "folder")
    stored = json.loads((tmp_path / "new" / "folder" / "metrics.json").read_text())
    assert stored["model"]["metrics"]["recall@10"]["value"] == report.model.quality.metrics["recall@10"].value
    assert stored["members"] == len(queries)
    table = pq.read_table(tmp_path / "new" / "folder" / "ranked.parquet")
    assert table.column_names == ["member_id", "query_timestamp", "item_ids", "scores"]
    assert table.num_rows == len(queries)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report_table(report))
    assert "Topics (frozen)" in console.export_text()


def test_vectors_of_the_wrong_catalogue_are_refused(tiny_dataset: Dataset) -> None:
    with pytest.raises(EvidenceError, match=r"Topics returned vectors \(59, 4\), expected 60"):
        evaluate_retrieval(tiny_dataset, TopicModel(items=59), "live", [])


def test_a_model_alone_is_judged_and_nothing_at_all_is_refused(tiny_dataset: Dataset) -> None:
    report = evaluate_retrieval(tiny_dataset, TopicModel(), "live", [])
    assert (report.best, report.differences) == ({}, {})
    assert report_table(report)
    with pytest.raises(EvidenceError, match="nothing to judge"):
        evaluate_retrieval(tiny_dataset, None, "live", [])


def test_a_live_baseline_is_no_rival_of_a_frozen_model(tiny_dataset: Dataset) -> None:
    report = evaluate_retrieval(tiny_dataset, TopicModel(), "frozen", [Popularity(), LivePopularity()])
    assert set(report.best.values()) == {"Popularity"}
    progressed: list[tuple[int, int]] = []
    evaluate_retrieval(tiny_dataset, None, "live", BASELINES, progress=lambda done, total: progressed.append((done, total)))
    assert progressed[-1][0] == progressed[-1][1] > 0


def test_a_folder_without_interactions_is_told_so(tiny_dataset: Dataset) -> None:
    silent = replace(tiny_dataset, events=tiny_dataset.events.take(np.zeros(len(tiny_dataset.events), bool)))
    assert choose_baselines(silent)
    with pytest.raises(EvidenceError, match="asks no question: the folder has no interactions"):
        evaluate_retrieval(silent, TopicModel(), "live", choose_baselines(silent))
