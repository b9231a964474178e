"""The page: whole, safe with hostile names, honest without matplotlib; and the probe of cosine against popularity."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from retrieval.data.schema import Dataset, MemberView
from retrieval.evidence.baselines import ItemNeighbours, Random
from retrieval.evidence.evaluate import RetrievalReport, evaluate_retrieval
from retrieval.evidence.page import render_page
from retrieval.evidence.plots import draw_curves, draw_slices, runs_of, shown_in_bars
from retrieval.evidence.popularity import LivePopularity, Popularity
from retrieval.evidence.protocol import last_after_cut
from retrieval.evidence.saved import write_report
from retrieval.evidence.similarity import Probe, correlation

HOSTILE = "</title><script>alert(1)</script><img src=http://evil.example/x onerror=x> $\\frac{ _\x00é"
BASELINES = [Random(), Popularity(), ItemNeighbours(), LivePopularity()]


class Loud:
    """Every member likes what is popular: cosine grows with the count before the cut."""

    def __init__(self, dataset: Dataset, name: str = "Loud", follow: float = 1.0) -> None:
        known = dataset.engagements.before(dataset.meta.cut_test)
        height = np.log1p(np.bincount(known.item, minlength=60)) / 10
        self.name = name
        self.angle = 0.8 - follow * height + (1 - abs(follow)) * np.random.default_rng(0).random(60) / 2

    def item_vectors(self, day_start: int) -> np.ndarray:
        return np.column_stack([np.cos(self.angle), np.sin(self.angle)]).astype(np.float32) * (3 + 0 * day_start)

    def member_vectors(self, views: Sequence[MemberView]) -> np.ndarray:
        return np.tile(np.array([2, 0], np.float32), (len(views), 1))


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def sources(self) -> list[str]:
        return [str(attributes["src"]) for tag, attributes in self.tags if "src" in attributes]


@pytest.fixture(scope="module")
def report(tiny_dataset: Dataset) -> RetrievalReport:
    """A report whose data set and model carry hostile names."""
    dataset = replace(tiny_dataset, meta=replace(tiny_dataset.meta, name=HOSTILE))
    left_out = {"ials": f"because {HOSTILE}"}
    return evaluate_retrieval(dataset, Loud(tiny_dataset, HOSTILE), "live", BASELINES, left_out=left_out)


def test_the_page_is_whole_and_no_name_becomes_markup(report: RetrievalReport) -> None:
    pytest.importorskip("matplotlib")
    page = Page(render_page(report, f"brewline evaluate retrieval '{HOSTILE}'"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "link", "object", "svg", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "href"]
    assert len(page.sources) == 4 and all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    words = "".join(page.words)
    assert words.count("alert(1)") > 4
    for said in ("strictly earlier", "rebuilt at the start of each query's day", "Spearman", "cold targets", "Item-kNN"):
        assert said in words
    assert [tag for tag, attributes in page.tags if attributes.get("class") == "ours"]


def test_axes_and_bars_say_what_the_report_says(report: RetrievalReport) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        axes = Figure().add_subplot()
        draw_curves(axes, runs_of(report), ours=True)
        assert [tick.get_text() for tick in axes.get_xticklabels()][-2:] == ["1,000", "2,000"]
        assert len(axes.lines) == 1 + len(BASELINES)
        assert axes.lines[-1].get_ydata()[3] == report.baselines[-1].quality.metrics["recall@10"].value
        bars = Figure().add_subplot()
        runs = shown_in_bars(report, "recall@10")
        draw_slices(bars, runs, "recall@10", ours=True)
    assert runs[0] is report.model and runs[1].name == "Item-kNN"
    there = [values for values in runs[1].quality.slices.values() if values["n"]]
    heights = [bar.get_height() for bar in bars.patches[len(there) : 2 * len(there)]]
    assert heights == [values["recall@10"] for values in there]


def test_every_number_of_the_table_stands_in_the_page(report: RetrievalReport) -> None:
    text = render_page(report)
    for run in report.baselines:
        value = run.quality.metrics["recall@10"].value
        assert f"{value:.4f}".lstrip("0") in text
    lead = report.differences["Random"]["ndcg@10"]
    assert f"<td>{lead.low:+.4f} .. {lead.high:+.4f}</td>" in text


def test_without_matplotlib_the_page_says_so(
    report: RetrievalReport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(render_page(report))
    assert not page.sources
    assert re.search(r"No plots: matplotlib is not installed.*brewline\[evaluate\]", "".join(page.words))
    assert "matplotlib" in caplog.text


def test_baselines_alone_make_a_page_and_twice_the_same(tiny_dataset: Dataset, tmp_path: Path) -> None:
    found = evaluate_retrieval(tiny_dataset, None, "live", BASELINES[:2])
    for name in ("one", "two"):
        write_report(found, tiny_dataset, tmp_path / name, "brewline evaluate baselines")
    one, two = ((tmp_path / name / "report.html").read_bytes() for name in ("one", "two"))
    assert one == two
    page = Page(one.decode())
    assert "Model minus baseline" not in page.words and "Similarity against popularity" not in page.words
    assert not (tmp_path / "one" / "ranked.parquet").exists()


@pytest.mark.parametrize(("follow", "sign"), [(1.0, 1), (-1.0, -1), (0.0, 0)])
def test_the_probe_finds_how_cosine_follows_popularity(tiny_dataset: Dataset, follow: float, sign: int) -> None:
    found = evaluate_retrieval(tiny_dataset, Loud(tiny_dataset, follow=follow), "frozen", []).similarity
    assert found is not None
    assert np.abs(found.cosine).max() <= 1 + 1e-6  # although the vectors have lengths 2 and 3
    for value in (found.pearson, found.spearman, found.within_member.value):
        assert value * sign > 0.9 if sign else abs(value) < 0.5
    queries = last_after_cut(tiny_dataset)
    assert len(found.cosine) == 60 * len(queries) - len(queries.excluded.values)


def test_the_probe_counts_what_was_known_at_that_moment(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    probe = Probe(len(queries), 60)
    moment = tiny_dataset.meta.cut_valid
    vectors = np.random.default_rng(0).random((60, 4)).astype(np.float32)
    probe.see(queries, vectors[: len(queries)], vectors, moment)
    known = np.log1p(np.bincount(tiny_dataset.engagements.before(moment).item, minlength=60)).astype(np.float32)
    candidates = np.setdiff1d(np.arange(60), queries.excluded[0])
    np.testing.assert_array_equal(probe.found().log_count[: len(candidates)], known[candidates])


def test_a_side_that_does_not_vary_has_no_correlation() -> None:
    assert np.isnan(correlation(np.ones(5), np.arange(5)))
    assert correlation(np.arange(5), 2 * np.arange(5)) == pytest.approx(1)
