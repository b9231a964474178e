"""Reading and writing a data folder: what is refused, what is an error, and that nothing is lost on the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.counts import NUMBERS
from retrieval.data.columns import LONGEST_ID, LONGEST_TEXT
from retrieval.data.read import read_dataset, read_dataset_report
from retrieval.data.schema import COUNT_COLUMNS, DAY, EVENT_COLUMNS, MISSING_TIME, DataError, Dataset
from retrieval.data.write import write_dataset
from retrieval.pooled_rate import POOLED

META = {"name": "tiny", "cut_valid": 10 * DAY, "cut_test": 20 * DAY, "retrieval_actions": ["like"], "label": "liked"}
ITEMS: dict[str, object] = {
    "item_id": ["a", "b", "c"],
    "title": ["Ale", None, "Cider"],
    "created_at": pa.array([5, None, -100], pa.int64()),
    "price": [1.5, float("inf"), None],
    "organic": [True, False, None],
    "n_events": [9, 9, 9],
    "place": ["x", "y", "z"],
}
EVENTS: dict[str, object] = {
    "event_id": [0, 1, 2, 3],
    "member_id": ["u", "v", "u", "v"],
    "item_id": ["a", "b", "c", "a"],
    "timestamp": [30 * DAY, 15 * DAY, 5 * DAY, 15 * DAY],
    "action": ["like", "like:much", "impression", "like"],
    "label": pa.array([1, 0, None, 1], pa.int8()),
    "value": [2.0, float("nan"), float("inf"), None],
}


def make_folder(
    folder: Path,
    items: Mapping[str, object] = ITEMS,
    events: Mapping[str, object] | None = EVENTS,
    members: Mapping[str, object] | None = None,
    connections: Mapping[str, object] | None = None,
    meta: Mapping[str, object] = META,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"items": items, "interactions": events, "members": members, "connections": connections}
    for name, columns in tables.items():
        if columns is not None:
            pq.write_table(pa.table(dict(columns)), folder / f"{name}.parquet")
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


def assert_same(one: Dataset, two: Dataset) -> None:
    assert one.meta == two.meta
    for name in ("item_id", "title", "text", "category", "creator"):
        assert getattr(one.items, name) == getattr(two.items, name), name
    np.testing.assert_array_equal(one.items.created_at, two.items.created_at)
    assert list(one.items.numbers) == list(two.items.numbers)
    assert (one.members.member_id, one.members.profile) == (two.members.member_id, two.members.profile)
    assert list(one.members.numbers) == list(two.members.numbers)
    for left, right in ((one.items, two.items), (one.members, two.members)):
        for name, column in left.numbers.items():
            np.testing.assert_array_equal(column, right.numbers[name])
    for name in EVENT_COLUMNS:
        left_column, right_column = getattr(one.events, name), getattr(two.events, name)
        assert left_column.dtype == right_column.dtype, name
        np.testing.assert_array_equal(left_column, right_column, err_msg=name)
    for name in ("actions", "requests", "surfaces"):
        assert getattr(one.events, name) == getattr(two.events, name), name
    assert (one.connections is None) == (two.connections is None)
    if one.connections is not None and two.connections is not None:
        np.testing.assert_array_equal(one.connections.member, two.connections.member)
        np.testing.assert_array_equal(one.connections.since, two.connections.since)
        assert (one.connections.other_id, one.connections.kind) == (two.connections.other_id, two.connections.kind)


def test_a_folder_is_read_into_rows_in_time_order(tmp_path: Path) -> None:
    dataset, refusals = read_dataset_report(make_folder(tmp_path))
    assert not len(refusals)
    events = dataset.events
    assert events.event_id.tolist() == [2, 1, 3, 0]  # equal times in event_id order
    assert [dataset.members.member_id[row] for row in events.member] == ["u", "v", "v", "u"]
    assert [dataset.items.item_id[row] for row in events.item] == ["c", "b", "a", "a"]
    assert events.split.tolist() == [0, 1, 1, 2]  # from the cuts, as the folder gives no split
    assert events.label.tolist() == [-1, 0, 1, 1]
    assert np.isnan(events.value).tolist() == [True, True, True, False]
    assert events.request.tolist() == events.position.tolist() == [-1] * 4
    assert dataset.is_engagement.tolist() == [False, True, True, True]
    assert dataset.items.title == ["Ale", "", "Cider"]
    assert dataset.items.created_at.tolist() == [5, MISSING_TIME, -100]


def test_counts_are_never_read_and_numbers_are_finite_or_missing(tmp_path: Path) -> None:
    members = {"member_id": ["u"], "job": ["brewer"], "n_events": [4], "age": [40]}
    dataset = read_dataset(make_folder(tmp_path, members=members))
    assert sorted(dataset.items.numbers) == ["organic", "price"]
    np.testing.assert_array_equal(dataset.items.numbers["price"], [1.5, np.nan, np.nan])
    np.testing.assert_array_equal(dataset.items.numbers["organic"], [1, 0, np.nan])
    assert dataset.members.member_id == ["u", "v"]
    assert dataset.members.profile == {"job": ["brewer", ""]}
    np.testing.assert_array_equal(dataset.members.numbers["age"], [40, np.nan])
    assert list(dataset.members.numbers) == ["age"]


def test_a_number_named_as_an_as_of_number_does_not_stand_in_its_place(tmp_path: Path) -> None:
    assert {*NUMBERS, POOLED} <= COUNT_COLUMNS
    items = {**ITEMS, **{name: [1.0, 2.0, 3.0] for name in (*NUMBERS, POOLED)}}
    assert sorted(read_dataset(make_folder(tmp_path, items=items)).items.numbers) == ["organic", "price"]


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("item_id", "zzz", "item_id is not in items.parquet"),
        ("item_id", " ", "item_id is missing or empty"),
        ("member_id", None, "member_id is missing or empty"),
        ("member_id", "x" * (LONGEST_ID + 1), "member_id is longer"),
        ("timestamp", None, "timestamp is missing"),
        ("timestamp", -1, "timestamp is negative"),
        ("timestamp", 1_700_000_000_000, "milliseconds"),
        ("timestamp", 1.5, "not a whole number"),
        ("label", 2, "label is not 0, 1 or null"),
        ("label", 300, "label is not 0, 1 or null"),
        ("event_id", 0, "duplicate event_id"),
        ("action", "", "action is missing or empty"),
        ("split", "future", "split is not train, valid or test"),
        ("position", -1, "position is negative"),
        ("position", 40_000, "position is over"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_file_row_and_reason(
    tmp_path: Path, column: str, value: object, reason: str
) -> None:
    columns = {**EVENTS, "label": [1, 0, None, 1], "split": ["test"] * 4, "position": [0, 1, 2, 3]}
    changed = list(columns[column])  # type: ignore[call-overload]
    if isinstance(value, float):
        changed = [float(each) for each in changed]
    changed[2] = value
    dataset, refusals = read_dataset_report(make_folder(tmp_path, events={**columns, column: changed}))
    assert len(dataset.events) == 3
    assert [(refusal.file, refusal.row) for refusal in refusals] == [("interactions.parquet", 2)]
    assert reason in refusals[0].reason


def test_items_and_connections_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    items = {
        "item_id": ["a", "", None, "a", "b", "c", "d"],
        "title": ["x", "x", "x", "x", "x", "t" * (LONGEST_TEXT + 1), "x"],
        "created_at": [0, 0, 0, 0, 0, 0, 10**13],
    }
    edges = {"member_id": ["u", "stranger", None], "other_id": ["v", "v", "v"], "kind": ["knows"] * 3}
    dataset, refusals = read_dataset_report(make_folder(tmp_path, items=items, connections=edges))
    assert dataset.items.item_id == ["a", "b"]
    found = {(refusal.file, refusal.row) for refusal in refusals}
    assert {row for file, row in found if file == "items.parquet"} == {1, 2, 3, 5, 6}
    assert {row for file, row in found if file == "connections.parquet"} == {1, 2}
    assert dataset.connections is not None and dataset.connections.since.tolist() == [MISSING_TIME]
    assert refusals.counts()["items.parquet: item_id is missing or empty"] == 2
    assert list(refusals) == refusals[:] and refusals[-1] == list(refusals)[-1]


def test_broken_utf8_is_refused_in_binary_and_in_string_columns(tmp_path: Path) -> None:
    broken = pa.array([b"fine", b"\xff\xfe", b"\xc3\xa9"])
    as_string = pa.StringArray.from_buffers(3, broken.buffers()[1], broken.buffers()[2])
    for name, column in {"binary": broken, "string": as_string}.items():
        folder = make_folder(tmp_path / name, items={"item_id": ["a", "b", "c"], "title": column}, events=None)
        dataset, refusals = read_dataset_report(folder)
        assert dataset.items.title == ["fine", "é"]
        assert str(refusals[0]) == "items.parquet row 1: title is not valid UTF-8"
    folder = make_folder(tmp_path / "id", events={**EVENTS, "member_id": [b"u", b"\xff", b"u", b"v"]})
    dataset, refusals = read_dataset_report(folder)
    assert [refusal.row for refusal in refusals] == [1] and len(dataset.events) == 3


def test_refused_rows_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_dataset(make_folder(tmp_path, events={**EVENTS, "item_id": ["a", "b\x1b[31m", "c", "a"]}))
    assert len(caplog.records) == 1
    assert "1 rows refused" in caplog.text and "row 1" in caplog.text and "\x1b" not in caplog.text


def test_a_malformed_folder_is_one_clear_line(tmp_path: Path) -> None:
    def fails(name: str, match: str, **parts: object) -> None:
        folder = make_folder(tmp_path / name, **parts)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=match):
            read_dataset(folder)

    with pytest.raises(DataError, match="is not a folder"):
        read_dataset(tmp_path / "nowhere")
    fails("column", "required column 'item_id' is missing", items={"title": ["x"]})
    fails("type", "'timestamp' is string, expected int64", events={**EVENTS, "timestamp": ["1", "2", "3", "4"]})
    fails("ids", "'item_id' is int64, expected string", items={"item_id": [1]})
    fails("empty", "no valid item is left of 1 rows.*item_id is missing", items={"item_id": [""]})
    fails("events", "none of 4 rows is valid", events={**EVENTS, "item_id": ["z"] * 4})
    fails("cuts", '"cut_valid" .* is after "cut_test"', meta={**META, "cut_valid": 21 * DAY})
    fails("nocuts", '"cut_valid" is None', meta={"name": "x", "retrieval_actions": ["like"]})
    fails("actions", '"retrieval_actions" is None', meta={"name": "x", "cut_valid": 0, "cut_test": 0})
    fails("order", "\"order\" is 'soon'", meta={**META, "order": "soon"})


@pytest.mark.parametrize("file", ["items.parquet", "interactions.parquet"])
@pytest.mark.parametrize("damage", ["cut", "text", "gone"])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, file: str, damage: str) -> None:
    folder = make_folder(tmp_path)
    path = folder / file
    if damage == "gone":
        path.unlink()
        if file == "items.parquet":
            with pytest.raises(DataError, match=r"items\.parquet is missing"):
                read_dataset(folder)
        else:
            assert not len(read_dataset(folder).events)
        return
    path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else b"item_id,title\n1,2\n")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_dataset(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_a_broken_dataset_json_is_one_clear_line(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path)
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.json"):
        read_dataset(folder)


def test_a_mark_of_byte_order_before_dataset_json_is_read_over(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "dataset.json").write_text(json.dumps(META), encoding="utf-8-sig")
    assert read_dataset(tmp_path).meta.name == "tiny"


def test_an_order_of_none_gets_the_same_pseudo_times_every_time(tmp_path: Path) -> None:
    count = 2_000
    events = {
        "event_id": list(range(count)),
        "member_id": [f"u{row % 50}" for row in range(count)],
        "item_id": ["a"] * count,
        "action": ["like"] * count,
    }
    meta = {"name": "timeless", "order": "none", "retrieval_actions": ["like"]}
    dataset = read_dataset(make_folder(tmp_path / "one", events=events, meta=meta))
    assert (dataset.meta.cut_valid, dataset.meta.cut_test) == (80 * DAY, 90 * DAY)
    assert (dataset.items.created_at == MISSING_TIME).all()
    shares = np.bincount(dataset.events.split, minlength=3) / count
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)
    assert np.all(np.diff(dataset.events.timestamp) >= 0)
    for split, (low, high) in enumerate(((0, 80), (80, 90), (90, 100))):
        days = dataset.events.day[dataset.events.split == split]
        assert days.min() >= low and days.max() < high and len(set(days.tolist())) == high - low
    backwards = {name: column[::-1] for name, column in events.items()}
    assert_same(dataset, read_dataset(make_folder(tmp_path / "two", events=backwards, meta=meta)))
    write_dataset(dataset, tmp_path / "three")
    assert_same(dataset, read_dataset(tmp_path / "three"))
    given = {**events, "split": ["test" if row % 2 else "train" for row in range(count)]}
    split = read_dataset(make_folder(tmp_path / "four", events=given, meta=meta)).events
    assert (split.split == np.where(split.event_id % 2, 2, 0)).all() and split.day[split.split == 2].min() >= 90


def test_writing_replaces_a_data_folder_and_nothing_else(tmp_path: Path) -> None:
    dataset = read_dataset(make_folder(tmp_path / "source"))
    target = tmp_path / "target"
    write_dataset(dataset, target)
    write_dataset(dataset, target)
    assert_same(dataset, read_dataset(target))
    (target / "diary.txt").write_text("mine")
    with pytest.raises(DataError, match=r"diary\.txt"):
        write_dataset(dataset, target)
    assert (target / "diary.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "items.parquet").write_text("mine")
    with pytest.raises(DataError, match=r"items\.parquet"):
        write_dataset(dataset, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source", "target"]  # no draft is left over


def test_what_the_schema_cannot_carry_is_not_written(tmp_path: Path) -> None:
    dataset = read_dataset(make_folder(tmp_path / "source"))
    for name in ("title", "n_events"):
        dataset.items.numbers[name] = np.zeros(3)
        with pytest.raises(DataError, match=name):
            write_dataset(dataset, tmp_path / "target")
        del dataset.items.numbers[name]
    dataset.items.title[0] = "\ud800"
    with pytest.raises(DataError, match="title"):
        write_dataset(dataset, tmp_path / "target")
    assert not (tmp_path / "target").exists()
