"""A night takes over what was put in and withdrawn by day: the newest word wins, nothing acknowledged is lost, killed or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import retrieval.refresh
from index.live import LIVE_DIR, LiveIndex
from index.publish import current, rollback
from index.snapshot import Snapshot
from index.wal import segments
from retrieval.catalog import Catalog
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, Item
from retrieval.encoder import Encoder
from retrieval.exported_changes import with_changes
from retrieval.live_catalog import LiveCatalog, LiveItems, PutItem, put_items
from retrieval.moments import end_of
from retrieval.parts import CatalogError
from retrieval.refresh import NightReport, nightly
from retrieval.taken_over import STATE_FILE, cut_of


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


def night(dataset: Dataset, encoder: Encoder, store: Path, hours: int = 0, now: float = 0) -> NightReport:
    moment = end_of(dataset) + hours * 3600
    return nightly(dataset, encoder, None, store, moment, clock=lambda: now or moment)


def served(store: Path) -> tuple[Snapshot, Catalog]:
    path = current(store)
    assert path is not None
    snapshot = Snapshot.open(path)
    return snapshot, Catalog.open(snapshot)


def change(store: Path, encoder: Encoder, put: Iterable[Item] = (), gone: Iterable[str] = (), at: int | None = None) -> None:
    """Changes as a server makes them, each acknowledged before the next."""
    snapshot, catalog = served(store)
    moment = snapshot.manifest.as_of if at is None else at
    with LiveIndex(snapshot, store, write=True) as live:
        for item in put:
            made, vectors = put_items(LiveCatalog(catalog, live.view(), LiveItems()), encoder, [item], moment)
            live.upsert([item.item_id], [made[0].to_bytes()], vectors, encoder.fingerprint)
        for one in gone:
            live.withdraw([one])


NEW = Item("new", "roses and compost", "about pruning", "gardens", "author 2", 1_800_000_000, {"price": 4.0})
OTHER = Item("i3", "a new title", "about zugzwang", "chess", "author 3", None, {})


def test_columns_of_many_rows_are_the_rows_one_by_one(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    """Rows of the night and live ones in one question, in any order; a number that the folder does not have is unknown."""
    night(tiny_dataset, encoder, tmp_path)
    change(tmp_path, encoder, [NEW, OTHER])
    snapshot, catalog = served(tmp_path)
    with LiveIndex(snapshot, tmp_path) as index:
        live = LiveCatalog(catalog, index.view(), LiveItems())
        rows = np.array([61, 5, 60, 3, 5])
        found = live.columns_of(rows, live.as_of_names, ["price", "weight"])
        for place, row in enumerate(rows.tolist()):
            item = live.item(row)
            expected = {**live.numbers(row), "price": item.numbers.get("price", np.nan), "weight": np.nan}
            np.testing.assert_array_equal([found[name][place] for name in expected], list(expected.values()))
        assert found["price"][2] == 4.0 and live.words("category", rows[2:4]) == ["gardens", tiny_dataset.items.category[3]]
        plain = catalog.columns_of(rows[[1, 3]], ["n_total"], ["price"])
        np.testing.assert_array_equal(plain["n_total"], found["n_total"][[1, 3]])
        np.testing.assert_array_equal(plain["price"], found["price"][[1, 3]])


def test_a_night_over_changes_is_a_full_rebuild_of_them(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    night(tiny_dataset, encoder, tmp_path)
    other = replace(OTHER, created_at=int(tiny_dataset.items.created_at[3]))
    change(tmp_path, encoder, [NEW, other], ["i7", "nobody"])
    report = night(tiny_dataset, encoder, tmp_path, 1)
    assert (report.items, report.put, report.withdrawn, report.live_position) == (60, 2, 2, 4)
    assert report.embedded == 0, "what was encoded by day reads the same at night"
    snapshot, catalog = served(tmp_path)
    assert catalog.row("new") == 59 and catalog.rows(["i7"]).tolist() == [-1]
    assert catalog.item(59) == NEW and catalog.item(catalog.row("i3")) == other
    counts = Counts.from_dataset(tiny_dataset).as_of(end_of(tiny_dataset))
    assert catalog.numbers(catalog.row("i3"))["n_total"] == counts["n_total"][3] > 0
    items = [catalog.item(row) for row in range(60)]
    numbers = {name: np.array([catalog.numbers(row)[name] for row in range(60)]) for name in catalog.as_of_names}
    np.testing.assert_allclose(snapshot.vectors, encoder.items(items, numbers), atol=1e-6)
    with LiveIndex(snapshot, tmp_path) as live:
        assert (live.view().items, live.view().position) == (60, 4), "the night's changes are not laid over it again"


def test_changes_are_kept_until_the_folder_could_know(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    night(tiny_dataset, encoder, tmp_path)
    cut = cut_of(tiny_dataset, end_of(tiny_dataset))
    change(tmp_path, encoder, [NEW, OTHER], ["i7"], at=cut)
    for hours in (1, 2, 3):
        assert (night(tiny_dataset, encoder, tmp_path, hours).items, len(served(tmp_path)[1])) == (60, 60)
    log = tiny_dataset.events
    again = log.take(np.append(np.arange(len(log)), len(log) - 1))
    newer = replace(tiny_dataset, events=replace(again, timestamp=np.append(log.timestamp, end_of(tiny_dataset) + DAY)))
    report = night(newer, encoder, tmp_path, 48)
    assert (report.items, report.put, report.withdrawn) == (60, 0, 0)
    catalog = served(tmp_path)[1]
    assert catalog.rows(["new", "i7"]).tolist() == [-1, 7] and catalog.item(3) == tiny_dataset.items[3]


def test_an_earlier_change_loses_to_the_folder(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    night(tiny_dataset, encoder, tmp_path)
    change(tmp_path, encoder, [OTHER], at=cut_of(tiny_dataset, end_of(tiny_dataset)) - 1)
    assert night(tiny_dataset, encoder, tmp_path, 1).put == 0
    assert served(tmp_path)[1].item(3) == tiny_dataset.items[3]


def test_the_last_word_on_an_item_wins(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    night(tiny_dataset, encoder, tmp_path)
    change(tmp_path, encoder, [NEW], ["new"])
    assert night(tiny_dataset, encoder, tmp_path, 1).items == 60
    change(tmp_path, encoder, [NEW])
    assert night(tiny_dataset, encoder, tmp_path, 2).items == 61
    change(tmp_path, encoder, [replace(NEW, title="roses")], ["i1"])
    assert night(tiny_dataset, encoder, tmp_path, 3).items == 60
    assert served(tmp_path)[1].item(59).title == "roses"


def test_another_encoder_reads_the_changes_anew(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, encoder_folders: tuple[Path, Path]
) -> None:
    other = Encoder.load(encoder_folders[1])
    night(tiny_dataset, encoder, tmp_path)
    change(tmp_path, encoder, [NEW], ["i7"])
    report = night(tiny_dataset, other, tmp_path, 1)
    assert (report.items, report.embedded, report.put) == (60, 60, 1)
    snapshot, catalog = served(tmp_path)
    numbers = {name: np.array([value]) for name, value in catalog.numbers(59).items()}
    np.testing.assert_allclose(snapshot.vectors[59], other.items([NEW], numbers)[0], atol=1e-6)


def test_an_item_that_is_withdrawn_again_is_not_exported(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    """The folder knows of the first withdrawal, and of the putting back; the second one it cannot know."""
    night(tiny_dataset, encoder, tmp_path)
    change(tmp_path, encoder, gone=["i7"])
    night(tiny_dataset, encoder, tmp_path, 1)
    log = tiny_dataset.events
    later = replace(tiny_dataset, events=replace(log, timestamp=log.timestamp + 2 * DAY))
    now = end_of(later) + DAY
    assert "i7" in with_changes(tmp_path, later, now)[0].items.item_id, "the folder's word is the newer one"
    change(tmp_path, encoder, [replace(OTHER, item_id="i7")], ["i7"], at=now - 5)
    grown, put, gone = with_changes(tmp_path, later, now)
    assert "i7" not in grown.items.item_id and (put, gone) == (0, 1)


class Killed(BaseException):
    """Ends a night where it stands."""


@pytest.mark.parametrize("stage", ["require_gates", "publish", "collect_garbage", "trim_folded", "ended"])
def test_a_night_killed_between_any_two_steps_loses_nothing_and_makes_the_same_bytes(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_rest: object, **_named: object) -> None:
        raise Killed

    monkeypatch.setattr("index.wal_writer.SEGMENT_BYTES", 1)
    night(tiny_dataset, encoder, tmp_path)
    change(tmp_path, encoder, [NEW, OTHER], ["i7"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(retrieval.refresh, stage, killed)
        night(tiny_dataset, encoder, tmp_path, 1)
    assert (tmp_path / STATE_FILE).exists()
    with LiveIndex(served(tmp_path)[0], tmp_path) as live:
        view = live.view()
        assert view.items == 60 and view.rows(["new", "i3"]).min() >= 0 and view.rows(["i7"]).tolist() == [-1]
    change(tmp_path, encoder, gone=["i9"])
    first = night(tiny_dataset, encoder, tmp_path, 1, now=5_000_000_000)
    assert (first.items, first.live_position, first.withdrawn) == (60, 3, 1), "what came meanwhile waits for the next night"
    assert not (tmp_path / STATE_FILE).exists()
    with LiveIndex(served(tmp_path)[0], tmp_path) as live:
        assert live.view().items == 59 and live.view().rows(["i9"]).tolist() == [-1]
    assert night(tiny_dataset, encoder, tmp_path, 2).items == 59


def test_a_resumed_night_makes_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for store in (tmp_path / "killed", tmp_path / "undisturbed"):
        night(tiny_dataset, encoder, store)
        change(store, encoder, [NEW, OTHER], ["i7"])
        if store.name == "killed":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(retrieval.refresh, "publish", lambda *_: (_ for _ in ()).throw(Killed))
                night(tiny_dataset, encoder, store, 1)
            change(store, encoder, gone=["i9"])
            names.append(night(tiny_dataset, encoder, store, 1, now=5_000_000_000).snapshot)
        else:
            names.append(night(tiny_dataset, encoder, store, 1).snapshot)
    assert names[0] == names[1]


def test_a_rollback_finds_its_changes_in_the_log(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.wal_writer.SEGMENT_BYTES", 1)
    night(tiny_dataset, encoder, tmp_path)
    for hours in range(1, 5):
        change(tmp_path, encoder, [replace(NEW, item_id=f"new {hours}")], [f"i{hours}"])
        moment = end_of(tiny_dataset) + hours * 3600
        removed = nightly(tiny_dataset, encoder, None, tmp_path, moment, keep=0, clock=lambda: 9e9).removed
        assert removed == (hours > 1)
    assert len(segments(tmp_path / LIVE_DIR)) < 8, "what no kept snapshot lacks leaves the log"
    rollback(tmp_path)
    with LiveIndex(served(tmp_path)[0], tmp_path) as live:
        view = live.view()
        assert view.items == 60 and view.rows([f"new {hours}" for hours in range(1, 5)]).min() >= 0
        assert view.rows([f"i{hours}" for hours in range(1, 5)]).max() == -1
    assert nightly(tiny_dataset, encoder, None, tmp_path, end_of(tiny_dataset) + 9 * 3600, clock=lambda: 9e9).items == 60


@pytest.mark.parametrize("broken", ["vectors.npy", "MANIFEST.json", "changes.bin"])
def test_a_broken_snapshot_loses_no_change(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, broken: str) -> None:
    night(tiny_dataset, encoder, tmp_path)
    change(tmp_path, encoder, [NEW], ["i7"])
    night(tiny_dataset, encoder, tmp_path, 1)
    change(tmp_path, encoder, [OTHER])
    night(tiny_dataset, encoder, tmp_path, 2)
    path = served(tmp_path)[0].path / broken
    path.write_bytes(path.read_bytes()[:-3])
    report = night(tiny_dataset, encoder, tmp_path, 3)
    assert report.predecessor.startswith("unreadable") and (report.items, report.put, report.withdrawn) == (60, 2, 1)
    assert served(tmp_path)[1].item(3) == OTHER


def test_a_torn_snapshot_of_the_same_night_does_not_keep_its_name(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(tiny_dataset, encoder, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(retrieval.refresh, "publish", lambda *_: (_ for _ in ()).throw(Killed))
        night(tiny_dataset, encoder, tmp_path, 1)
    before = current(tmp_path)
    (torn,) = [path for path in (tmp_path / "snapshots").iterdir() if path != before and path.name[0] != "."]
    for name in ("vectors.npy", "catalog.arrow"):  # a power cut: the names are there, the content is not
        (torn / name).write_bytes((torn / name).read_bytes()[:100])
    report = night(tiny_dataset, encoder, tmp_path, 1)
    assert report.snapshot == torn.name and report.published
    served(tmp_path)[0].verify()
    assert not list((tmp_path / "snapshots").glob(".trash-*")), "swept by the collector of the same night"


def test_an_item_of_the_log_comes_back_or_is_an_error() -> None:
    put = PutItem(NEW, {"n_total": 3.0, "positive_rate": float("nan")}, "d", 7)
    assert PutItem.parse(put.to_bytes()) == replace(put, numbers={"n_total": 3.0}), "an unknown number is left out"
    for damaged in (b"{}", b"", put.to_bytes()[:-1], put.to_bytes().replace(b'"format": 1', b'"format": 2')):
        with pytest.raises(CatalogError, match="put it in again"):
            PutItem.parse(damaged)
