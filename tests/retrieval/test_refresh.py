"""The night publishes what is known at its moment, encodes only what changed, and leaves yesterday serving when it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.check import GateFailed
from index.publish import current
from index.snapshot import Snapshot
from index.store import open_store
from retrieval.catalog import Catalog
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, Item
from retrieval.encoder import Encoder
from retrieval.members import VECTOR, MemberStore
from retrieval.moments import NightError, end_of, read_as_of, warn_if_quiet
from retrieval.records import view_of
from retrieval.refresh import nightly
from retrieval.writer import Writer


class WordCounter:
    """Stands for a ranker: the night only needs its fingerprint and token rows."""

    fingerprint = "a" * 20

    def item_tokens(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        return [[len(item.title), int(total)] for item, total in zip(items, numbers["n_total"])]


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


def members_of(folder: Path, encoder: Encoder) -> MemberStore:
    return MemberStore(open_store(f"sqlite:{folder / 'members.sqlite'}"), encoder.fingerprint)


def served(store: Path) -> tuple[Snapshot, Catalog]:
    path = current(store)
    assert path is not None
    snapshot = Snapshot.open(path)
    return snapshot, Catalog.open(snapshot)


def test_a_night_publishes_vectors_words_numbers_tokens_and_members(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder
) -> None:
    members = members_of(tmp_path, encoder)
    moment = end_of(tiny_dataset)
    told: list[str] = []
    report = nightly(
        tiny_dataset, encoder, WordCounter(), tmp_path / "store", moment, members, lambda stage, _done, _of: told.append(stage)
    )
    assert (report.items, report.embedded, report.members, report.members_encoded) == (60, 60, 40, 40)
    assert (report.published, report.recall, report.ranker) == (True, 1.0, "a" * 20)
    assert set(told) == {"items", "index", "ranker tokens", "members"}
    snapshot, catalog = served(tmp_path / "store")
    assert (snapshot.name, catalog.as_of, snapshot.manifest.fingerprint) == (report.snapshot, moment, encoder.fingerprint)
    counts = Counts.from_dataset(tiny_dataset).as_of(moment)
    for row in range(60):
        assert catalog.item(row) == tiny_dataset.items[row]
        np.testing.assert_array_equal(catalog.numbers(row)["n_total"], counts["n_total"][row])
        assert catalog.tokens([row])[0].tolist() == [len(tiny_dataset.items.title[row]), int(counts["n_total"][row])]
    np.testing.assert_allclose(snapshot.vectors, encoder.items([tiny_dataset.items[row] for row in range(60)], counts), atol=1e-6)


def test_a_stored_vector_is_what_the_service_would_encode(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    members = members_of(tmp_path, encoder)
    nightly(tiny_dataset, encoder, None, tmp_path / "store", end_of(tiny_dataset), members)
    catalog = served(tmp_path / "store")[1]
    for member_id in ("m0", "m7", "m39"):
        known = members.get(member_id)
        assert known.vector is not None
        np.testing.assert_allclose(known.vector, encoder.members([view_of(known.record, catalog)])[0], atol=1e-5)


def test_the_same_night_again_does_nothing_twice(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    members = members_of(tmp_path, encoder)
    moment = end_of(tiny_dataset)
    first = nightly(tiny_dataset, encoder, None, tmp_path / "store", moment, members)
    again = nightly(tiny_dataset, encoder, None, tmp_path / "store", moment, members)
    assert (again.snapshot, again.published, again.embedded, again.members_encoded) == (first.snapshot, False, 0, 0)
    assert (first.predecessor, first.items_before) == ("", None)
    assert (again.predecessor, again.items_before) == (first.snapshot, 60)
    right = np.array(served(tmp_path / "store")[0].vectors)
    later = nightly(tiny_dataset, encoder, None, tmp_path / "store", moment + 3600, members)
    assert (later.published, later.embedded, later.members_encoded, later.predecessor) == (True, 0, 0, first.snapshot)
    np.testing.assert_array_equal(served(tmp_path / "store")[0].vectors, right)


def test_only_what_reads_differently_is_encoded_again(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    store, members = tmp_path / "store", members_of(tmp_path, encoder)
    moment = end_of(tiny_dataset)
    nightly(tiny_dataset, encoder, None, store, moment, members)
    items = tiny_dataset.items
    title = ["a new title", *items.title[1:]]
    changed = replace(tiny_dataset, items=replace(items, title=title, item_id=[*items.item_id[:-1], "newcomer"]))
    report = nightly(changed, encoder, None, store, moment + 3600, members)
    assert report.embedded == 2
    liked = {
        int(member) for member, item in zip(tiny_dataset.engagements.member, tiny_dataset.engagements.item) if item in (0, 59)
    }
    assert report.members_encoded == len(liked) > 0
    snapshot, catalog = served(store)
    fresh = nightly(changed, encoder, None, tmp_path / "fresh", moment + 3600)
    assert fresh.embedded == 60
    np.testing.assert_allclose(snapshot.vectors, served(tmp_path / "fresh")[0].vectors, atol=1e-6)
    assert catalog.item(0).title == "a new title"


def test_a_night_writes_what_it_encodes_once(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Writer.items

    def watched(writer: Writer, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        written.extend(item.item_id for item in items)
        return write(writer, items, numbers)

    monkeypatch.setattr(Writer, "items", watched)
    moment = end_of(tiny_dataset)
    nightly(tiny_dataset, encoder, None, tmp_path, moment)
    assert sorted(written) == sorted(tiny_dataset.items.item_id)
    written.clear()
    title = [*tiny_dataset.items.title[:7], "a new title", *tiny_dataset.items.title[8:]]
    changed = replace(tiny_dataset, items=replace(tiny_dataset.items, title=title))
    assert nightly(changed, encoder, None, tmp_path, moment + 3600).embedded == 1
    assert written == [tiny_dataset.items.item_id[7]]


def test_another_encoder_starts_from_nothing(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, encoder_folders: tuple[Path, Path]
) -> None:
    other = Encoder.load(encoder_folders[1])
    nightly(tiny_dataset, encoder, None, tmp_path / "store", end_of(tiny_dataset))
    report = nightly(tiny_dataset, other, None, tmp_path / "store", end_of(tiny_dataset))
    assert report.embedded == 60
    assert served(tmp_path / "store")[0].manifest.fingerprint == other.fingerprint
    with pytest.raises(NightError, match=encoder.fingerprint):
        nightly(tiny_dataset, other, None, tmp_path / "store", 1, members_of(tmp_path, encoder))


def test_a_night_knows_nothing_of_its_future(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    members = members_of(tmp_path, encoder)
    moment = tiny_dataset.meta.cut_valid
    report = nightly(tiny_dataset, encoder, WordCounter(), tmp_path / "store", moment, members)
    assert 0 < report.items < 60
    past = replace(tiny_dataset, events=tiny_dataset.events.before(moment))
    alone = nightly(past, encoder, WordCounter(), tmp_path / "alone", moment)
    assert alone.snapshot == report.snapshot, "what happens after the moment must not change a byte"
    assert max(entry.timestamp for entry in members.get("m1").record.history) < moment
    with pytest.raises(NightError, match="--as-of end"):
        nightly(tiny_dataset, encoder, None, tmp_path / "store", 0)


def test_a_failed_gate_leaves_yesterday_serving(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    store, members = tmp_path / "store", members_of(tmp_path, encoder)
    moment = end_of(tiny_dataset)
    first = nightly(tiny_dataset, encoder, None, store, moment, members)
    few = replace(tiny_dataset, items=replace(tiny_dataset.items, created_at=np.full(60, moment + DAY)))
    few = replace(few, events=few.events.take(few.events.item < 3))
    with pytest.raises(GateFailed, match="count"):
        nightly(few, encoder, None, store, moment, members)
    assert served(store)[0].name == first.snapshot


def test_a_clock_that_went_back_is_said(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    moment = end_of(tiny_dataset)
    nightly(tiny_dataset, encoder, None, tmp_path, moment)
    report = nightly(tiny_dataset, encoder, None, tmp_path, moment - DAY)
    assert report.published and "is the clock right?" in caplog.text
    for no_time in (moment * 1_000, 10**30, -(10**30)):
        with pytest.raises(NightError, match="milliseconds"):
            nightly(tiny_dataset, encoder, None, tmp_path, no_time)
    (tmp_path / "file").touch()
    with pytest.raises(NightError, match="cannot be written"):
        nightly(tiny_dataset, encoder, None, tmp_path / "file", moment)


def test_a_damaged_vector_of_a_member_is_made_again(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    store, moment = open_store(f"sqlite:{tmp_path / 'members.sqlite'}"), end_of(tiny_dataset)
    members = MemberStore(store, encoder.fingerprint)
    nightly(tiny_dataset, encoder, None, tmp_path / "store", moment, members)
    whole = store.get_many(VECTOR, ["m0", "m1", "m2", "m3"], encoder.fingerprint)
    m0, m1, m2, _ = (value or b"" for value in whole)
    damaged = {"m0": m0[:-1], "m1": m1[:-4], "m2": m2[:-4] + b"\x00\x00\xc0\x7f", "m3": b""}
    store.put_many(VECTOR, damaged, encoder.fingerprint)
    report = nightly(tiny_dataset, encoder, None, tmp_path / "store", moment + 3600, members)
    assert (report.embedded, report.members_encoded) == (0, 4)
    assert "3 vectors of members are damaged" in caplog.text
    for member_id, value in zip(damaged, whole):
        (mended,) = store.get_many(VECTOR, [member_id], encoder.fingerprint)
        assert mended is not None and value is not None and len(mended) == len(value)
        assert members.get(member_id).vector is not None
    store.close()


def test_moments_as_people_write_them(tiny_dataset: Dataset) -> None:
    assert read_as_of("now", tiny_dataset, 12.9) == 12
    assert read_as_of("1700000000", tiny_dataset, 0) == 1_700_000_000
    assert read_as_of("2024-01-02", tiny_dataset, 0) == 1_704_153_600
    assert read_as_of("2024-01-02T01:00+01:00", tiny_dataset, 0) == 1_704_153_600
    last = int(tiny_dataset.events.timestamp.max())
    assert last < read_as_of("end", tiny_dataset, 0) <= last + DAY
    with pytest.raises(NightError, match="tomorrow-ish"):
        read_as_of("tomorrow-ish", tiny_dataset, 0)


def test_a_night_far_from_the_last_event_is_told(tiny_dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    last = int(tiny_dataset.events.timestamp[-1])
    for text, now in (("now", last + 3 * DAY), ("end", 0), (str(last - 90 * DAY), 0)):
        warn_if_quiet(text, read_as_of(text, tiny_dataset, now), tiny_dataset)
    assert not caplog.records
    warn_if_quiet("now", last + 419 * DAY, tiny_dataset)
    created = tiny_dataset.items.created_at.copy()
    created[3] = last + 20_000 * DAY
    late = replace(tiny_dataset, items=replace(tiny_dataset.items, created_at=created))
    warn_if_quiet("end", read_as_of("end", late, 0), late)
    far, made = (record.getMessage() for record in caplog.records)
    assert "419 days before" in far and "--as-of end" in far and "20,000 days" in made and "made later" in made
    for absurd in (1_700_000_000_000, 10**20):
        with pytest.raises(NightError, match="milliseconds"):
            warn_if_quiet(str(absurd), absurd, tiny_dataset)
