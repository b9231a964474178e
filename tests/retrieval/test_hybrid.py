"""Words and what is popular beside the dense list: the same BM25 as the baseline's, nothing excluded, nobody left short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.publish import current
from index.snapshot import Snapshot
from retrieval.counts import Counts
from retrieval.data.schema import Dataset, Engagement, Item, Items, Member, MemberView
from retrieval.encoder import Encoder
from retrieval.evidence.baselines import Past
from retrieval.evidence.protocol import last_after_cut, member_views
from retrieval.evidence.text_baselines import Bm25
from retrieval.hybrid import Hybrid, HybridError, HybridSettings, query_words
from retrieval.lexical import Lexical, write_lexical
from retrieval.moments import end_of
from retrieval.parts import CatalogError
from retrieval.popular import Popular
from retrieval.refresh import SnapshotForm, nightly
from retrieval.retrieve import Retriever

NONE = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, encoder: Encoder) -> Snapshot:
    store = tmp_path_factory.mktemp("hybrid")
    nightly(tiny_dataset, encoder, None, store, end_of(tiny_dataset), form=SnapshotForm(hybrid=HybridSettings(popular=0.2)))
    path = current(store)
    assert path is not None
    return Snapshot.open(path)


@pytest.fixture
def retriever(encoder: Encoder, snapshot: Snapshot) -> Retriever:
    return Retriever.of(snapshot, encoder, hybrid=Hybrid.open(snapshot))


def view_of(dataset: Dataset, *rows: int, action: str = "like") -> MemberView:
    return MemberView(Member("m"), tuple(Engagement(dataset.items[row], row, action) for row in rows))


def test_words_are_weighed_as_the_baseline_weighs_them(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    expected = Bm25(newest=5).fit(Past(tiny_dataset, "test"))(queries)
    lexical = Lexical.of_items(tiny_dataset.items)
    for row, view in enumerate(member_views(tiny_dataset, queries)):
        plain = MemberView(Member("m"), view.history)  # the baseline reads no profile
        found = lexical.find(query_words(plain, 5), 60, NONE)
        assert len(found) == np.count_nonzero(expected[row])
        assert (np.diff(expected[row, found]) <= 1e-4).all()


def test_the_mapped_part_is_the_one_in_memory(snapshot: Snapshot, tiny_dataset: Dataset) -> None:
    assert snapshot.part("lexical.arrow").read_bytes() == write_lexical(tiny_dataset.items)
    query = query_words(view_of(tiny_dataset, 3, 9), 5)
    one, other = Lexical.open(snapshot), Lexical.of_items(tiny_dataset.items)
    assert one.find(query, 60, NONE).tolist() == other.find(query, 60, NONE).tolist()
    assert one.find({"no-such-word": 1, "zzz": 2, "": 1}, 60, NONE).tolist() == []


def test_a_query_is_the_newest_engagements_the_profile_and_the_wish(tiny_dataset: Dataset) -> None:
    shown = view_of(tiny_dataset, 1, action="impression").history
    view = MemberView(
        Member("m", {"role": "Fond of rail"}), (*view_of(tiny_dataset, 0, 4).history, *shown), instruction="more chess"
    )
    words = query_words(view, 1)
    assert words["fond"] == words["rail"] == words["more"] == words["chess"] == 1
    assert words["coffee"] == 1, "the newest engagement only"
    assert "trains" not in words, "what was only shown says nothing"
    long = MemberView(Member("m"), (Engagement(Item("i", title="word " * 10_000), 1, "like"),))
    assert query_words(long, 1)["word"] == 800, "one hostile field must not cost minutes"


def test_equal_words_come_by_row_also_at_the_edge(tiny_dataset: Dataset) -> None:
    lexical = Lexical.of_items(tiny_dataset.items)
    of_one = lexical.find({"coffee": 1}, 60, NONE)
    assert set(of_one.tolist()) == set(range(0, 60, 4))
    assert lexical.find({"coffee": 1}, 4, NONE).tolist() == of_one[:4].tolist()
    rest = lexical.find({"coffee": 1}, 60, of_one[:3])
    assert rest.tolist() == of_one[3:].tolist()


def test_a_catalogue_without_words_answers_nothing() -> None:
    items = Items(["a", "b"], ["", "x"], ["", ""], ["", "?"], ["", ""], np.zeros(2, np.int64))
    assert Lexical.of_items(items).find({"x": 1, "": 1}, 5, NONE).tolist() == []
    named = replace(items, title=["Ñandú 日本 zz", "ñandú"])
    assert Lexical.of_items(named).find({"ñandú": 1}, 5, NONE).tolist() == [1, 0], "the shorter one first"
    assert [Lexical.of_items(named).find({word: 1}, 5, NONE).tolist() for word in ("日本", "zz", "zzz", "n")] == [
        [0],
        [0],
        [],
        [],
    ]
    assert Popular.of_numbers({"n_7d": np.zeros(2), "n_30d": np.zeros(2)}).find(5, NONE).tolist() == []


def test_the_popular_list_is_the_nights_counts(snapshot: Snapshot, tiny_dataset: Dataset) -> None:
    numbers = Counts.from_dataset(tiny_dataset, before=end_of(tiny_dataset)).as_of(end_of(tiny_dataset))
    found = Popular.open(snapshot).find(60, NONE)
    keys = [(-numbers["n_7d"][row], -numbers["n_30d"][row], row) for row in found.tolist()]
    assert keys == sorted(keys) and len(found) == np.count_nonzero(numbers["n_30d"])
    assert Popular.open(snapshot).find(3, found[1:3]).tolist() == [found[0], *found[3:5]]


def test_nothing_excluded_and_nobody_short(retriever: Retriever, tiny_dataset: Dataset) -> None:
    view = view_of(tiny_dataset, 0, 4, 8)
    vector = retriever.describe(view)
    assert retriever.first_stage == "hybrid"
    everything = retriever.retrieve(vector, 60, view=view)
    assert sorted(everything.rows.tolist()) == list(range(60)) and (np.diff(everything.scores) <= 0).all()
    unwanted = [f"i{row}" for row in range(50)]
    rest = retriever.retrieve(vector, 60, unwanted, view)
    assert sorted(rest.ids) == sorted(f"i{row}" for row in range(50, 60))
    assert retriever.retrieve(vector, 10, view=view).ids == everything.ids[:10], "a short answer is the head of a long one"
    assert retriever.retrieve(vector, 10, view=MemberView(Member("m"))).ids != everything.ids[:10], "words count"
    with pytest.raises(HybridError, match="words"):
        retriever.retrieve(vector, 10)


def test_a_snapshot_says_how_it_merges(snapshot: Snapshot, encoder: Encoder, tiny_dataset: Dataset, tmp_path: Path) -> None:
    assert Hybrid.open(snapshot).settings == HybridSettings(1.0, 0.5, 0.2)
    report = nightly(tiny_dataset, encoder, None, tmp_path, end_of(tiny_dataset))
    assert not report.hybrid
    path = current(tmp_path)
    assert path is not None
    plain = Snapshot.open(path)
    assert "lexical.arrow" not in plain.parts
    with pytest.raises(HybridError, match="has no lexical index"):
        Hybrid.open(plain)


def test_parts_of_other_items_are_refused(snapshot: Snapshot) -> None:
    smaller = Snapshot(snapshot.path, replace(snapshot.manifest, count=20))
    for part in (Lexical, Popular):
        with pytest.raises(CatalogError, match="publish a new night"):
            part.open(smaller)


@pytest.mark.parametrize("weights", ["", "1", "1,2", "a,b,c", "0,1,1", "1,0,0", "1,-1,1", "nan,1,1", "1,inf,1"])
def test_weights_that_mean_nothing_are_refused(weights: str) -> None:
    with pytest.raises(HybridError, match="expected"):
        HybridSettings.parse(weights)
    assert HybridSettings.parse("1,0.3,0") == HybridSettings(1.0, 0.3, 0.0)
