"""Language and region: from the folder to the filter, through every night, and into no prompt and no vector."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from index.live import LiveIndex
from index.publish import current
from index.snapshot import Snapshot
from index.store import open_store
from retrieval.attributes import UnknownAttribute, Wanted
from retrieval.catalog import Catalog, write_catalog
from retrieval.data.check import check_folder
from retrieval.data.columns import LONGEST_TEXT
from retrieval.data.read import read_dataset, read_dataset_report
from retrieval.data.schema import DataError, Dataset, Item, Items, MemberView
from retrieval.data.write import write_dataset
from retrieval.encoder import Encoder
from retrieval.exported_changes import with_changes
from retrieval.learn.checkpoint import dataset_digest
from retrieval.live_catalog import LiveCatalog, LiveItems, put_items
from retrieval.members import MemberStore
from retrieval.moments import end_of
from retrieval.parts import CatalogError
from retrieval.records import ItemWords, records_of, view_digest, view_of
from retrieval.refresh import NightReport, SnapshotForm, nightly
from retrieval.retrieve import Retriever

CODES = ("no", "de", "", "de|en")
NEW = Item("new", "roses and compost", "about pruning", "gardens", "author 2", 1_800_000_000, {"price": 4.0})
REPLACED = replace(NEW, item_id="i1")


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


@pytest.fixture(scope="module")
def spoken(tiny_dataset: Dataset) -> Dataset:
    """Of four items one is in Norwegian, one in German, one in nobody knows what and one in two; only i5 is of a region."""
    count = len(tiny_dataset.items)
    facets = {
        "language": [CODES[row % 4] for row in range(count)],
        "region": ["north" if row == 5 else "" for row in range(count)],
    }
    return replace(tiny_dataset, items=replace(tiny_dataset.items, facets=facets))


def ids(*places: int) -> set[str]:
    """The items whose place among four is one of these."""
    return {f"i{row}" for row in range(60) if row % 4 in places}


QUESTIONS = (
    (Wanted(languages=frozenset({"no"})), ids(0)),
    (Wanted(languages=frozenset({"de"})), ids(1, 3)),
    (Wanted(languages=frozenset({"en", "no"})), ids(0, 3)),
    (Wanted(languages=frozenset({"fr"})), set()),
    (Wanted(regions=frozenset({"north"})), {"i5"}),
    (Wanted(regions=frozenset({"north"}), languages=frozenset({"no"})), set()),
)


def night(dataset: Dataset, encoder: Encoder, store: Path, hours: int = 0, shards: int = 1) -> NightReport:
    return nightly(dataset, encoder, None, store, end_of(dataset) + hours * 3600, form=SnapshotForm(shards=shards))


def served(store: Path) -> Snapshot:
    path = current(store)
    assert path is not None
    return Snapshot.open(path)


def answered(retriever: Retriever, view: MemberView, wanted: Wanted) -> set[str]:
    return set(retriever.retrieve(retriever.describe(view), 100, view=view, wanted=wanted).ids)


@pytest.mark.parametrize("shards", [1, 3])
def test_only_items_of_the_language_and_region_are_answered(
    tmp_path: Path, spoken: Dataset, tiny_dataset: Dataset, encoder: Encoder, shards: int
) -> None:
    night(spoken, encoder, tmp_path / "store", shards=shards)
    retriever = Retriever.of(served(tmp_path / "store"), encoder)
    view = view_of(next(records_of(spoken, end_of(spoken))), retriever.catalog)
    for wanted, expected in QUESTIONS:
        assert answered(retriever, view, wanted) == expected, wanted
    assert [retriever.catalog.item(row) for row in range(60)] == [spoken.items[row] for row in range(60)]
    night(tiny_dataset, encoder, tmp_path / "plain", shards=shards)
    silent = Retriever.of(served(tmp_path / "plain"), encoder)
    for wanted, _ in QUESTIONS:
        with pytest.raises(UnknownAttribute, match=r"no column '(language|region)' to filter by; it has category, creator:"):
            answered(silent, view, wanted)


def test_a_snapshot_of_items_without_facets_holds_what_it_always_held(spoken: Dataset) -> None:
    def columns(items: Items) -> list[str]:
        content = write_catalog(items, {"n_total": np.zeros(60)}, ["d"] * 60, 7)
        return list(pyarrow.ipc.open_file(io.BytesIO(content)).schema.names)

    old = ["item_id", "title", "text", "category", "creator", "created_at", "static:price", "asof:n_total", "digest"]
    assert columns(replace(spoken.items, facets={})) == old
    assert columns(spoken.items) == [*old[:5], "language", "region", *old[5:]]
    with pytest.raises(CatalogError, match="one length"):
        columns(replace(spoken.items, facets={"region": ["north"]}))


def test_a_changed_language_is_found_by_and_nothing_is_encoded_again(
    tmp_path: Path, spoken: Dataset, tiny_dataset: Dataset, encoder: Encoder
) -> None:
    members = MemberStore(open_store(f"sqlite:{tmp_path / 'members.sqlite'}"), encoder.fingerprint)
    moment, store = end_of(spoken), tmp_path / "store"
    moved = replace(spoken, items=replace(spoken.items, facets={"language": ["fr", *spoken.items.facets["language"][1:]]}))
    first = nightly(tiny_dataset, encoder, None, store, moment, members)
    for hours, dataset, languages in (
        (1, spoken, {"no": ids(0), "fr": set()}),
        (2, moved, {"no": ids(0) - {"i0"}, "fr": {"i0"}}),
    ):
        report = nightly(dataset, encoder, None, store, moment + hours * 3600, members)
        assert report.published and (report.embedded, report.members_encoded) == (0, 0) and first.embedded == 60
        retriever = Retriever.of(served(store), encoder)
        view = view_of(next(records_of(spoken, moment)), retriever.catalog)
        for language, expected in languages.items():
            assert answered(retriever, view, Wanted(languages=frozenset({language}))) == expected
    with pytest.raises(UnknownAttribute, match="no column 'region' to filter by; it has category, creator, language:"):
        answered(retriever, view, Wanted(regions=frozenset({"north"})))


def test_no_digest_and_no_prompt_reads_them(spoken: Dataset, tiny_dataset: Dataset, encoder: Encoder) -> None:
    assert dataset_digest(spoken) == dataset_digest(tiny_dataset)
    numbers = {name: np.zeros(60) for name in encoder.writer.quantizer.names}
    told, silent = ([data.items[row] for row in range(60)] for data in (spoken, tiny_dataset))
    assert told != silent and encoder.writer.items(told, numbers) == encoder.writer.items(silent, numbers)
    record = next(record for record in records_of(spoken, end_of(spoken)) if record.history)
    views = [view_of(record, ItemWords(data.items)) for data in (spoken, tiny_dataset)]
    assert views[0] != views[1] and view_digest(views[0]) == view_digest(views[1])


def test_an_item_put_in_by_day_is_of_no_known_language(tmp_path: Path, spoken: Dataset, encoder: Encoder) -> None:
    night(spoken, encoder, tmp_path)
    snapshot = served(tmp_path)
    with LiveIndex(snapshot, tmp_path, write=True) as live:
        for item in (NEW, REPLACED):
            night_words = LiveCatalog(Catalog.open(snapshot), live.view(), LiveItems())
            made, vectors = put_items(night_words, encoder, [item], snapshot.manifest.as_of)
            live.upsert([item.item_id], [made[0].to_bytes()], vectors, encoder.fingerprint)
        view = live.view()
        by_day = Retriever(encoder, view, LiveCatalog(Catalog.open(snapshot), view, LiveItems()))
        asker = view_of(next(records_of(spoken, end_of(spoken))), by_day.catalog)
        for wanted, expected in QUESTIONS:
            assert answered(by_day, asker, wanted) == expected - {"i1"}, wanted
        assert {"new", "i1"} <= answered(by_day, asker, Wanted(categories=frozenset({"gardens"})))
    night(spoken, encoder, tmp_path, hours=1)
    retriever = Retriever.of(served(tmp_path), encoder)
    kept = replace(REPLACED, facets=spoken.items[1].facets)
    assert len(retriever.catalog) == 61 and retriever.catalog.item(1) == kept, "nobody can say a language by day"
    for wanted, expected in QUESTIONS:
        assert answered(retriever, asker, wanted) == expected, wanted
    grown = with_changes(tmp_path, spoken, end_of(spoken) + 7200)[0]
    assert grown.items.facets["language"] == [*spoken.items.facets["language"], ""]


def test_the_folder_carries_them_and_its_check_tells_how_many_are_known(tmp_path: Path, spoken: Dataset) -> None:
    write_dataset(spoken, tmp_path / "folder")
    assert read_dataset(tmp_path / "folder").items.facets == spoken.items.facets
    report = check_folder(tmp_path / "folder")
    assert report.texts["language"] == 0.75 and report.texts["region"] == pytest.approx(1 / 60) and not report.ignored_columns
    unknown = replace(spoken, items=replace(spoken.items, facets={"language": [""] * 60}))
    write_dataset(unknown, tmp_path / "folder")
    assert "language" not in pq.read_schema(tmp_path / "folder" / "items.parquet").names
    taken = replace(spoken, items=replace(spoken.items, numbers={"region": np.zeros(60)}))
    with pytest.raises(DataError, match="number column is named 'region'"):
        write_dataset(taken, tmp_path / "folder")


def test_a_broken_word_is_refused_as_one_of_the_category_is(tmp_path: Path, spoken: Dataset) -> None:
    write_dataset(spoken, tmp_path)
    path = tmp_path / "items.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("language")

    def with_languages(column: pa.Array) -> Path:
        pq.write_table(table.set_column(place, "language", column), path, store_schema=False)
        return tmp_path

    words = [b"no", b"\xff", b"x" * (LONGEST_TEXT + 1), None, *[b"de"] * 56]
    dataset, refusals = read_dataset_report(with_languages(pa.array(words, pa.binary())))
    said = [(refusal.row, refusal.reason) for refusal in refusals if refusal.file == "items.parquet"]
    assert said == [(1, "language is not valid UTF-8"), (2, f"language is longer than {LONGEST_TEXT:,} bytes")]
    assert dataset.items.facets["language"] == ["no", "", *["de"] * 56]
    coded = read_dataset(with_languages(pa.array(range(60), pa.int64()))).items
    assert "language" not in coded.facets and coded.numbers["language"][7] == 7, "a code of digits is a number, as any column is"
    listed = read_dataset(with_languages(pa.array([["no", "en"]] * 60))).items
    assert "language" not in {**listed.facets, **listed.numbers}, "and a list is not read"
    assert "language" not in read_dataset(with_languages(pa.nulls(60))).items.facets
