"""The check report: sizes that are right, and each leak warning raised by its leak and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ranking.cli.data import KINDS, app
from retrieval.data.check import check_folder
from retrieval.data.read import read_dataset
from retrieval.data.schema import DAY
from retrieval.data.sources.importers import IMPORTERS

ITEMS, EVENTS = 120, 2_000
START = 20_000 * DAY


def clean_folder(
    folder: Path,
    items: dict[str, object] | None = None,
    events: dict[str, object] | None = None,
    members: dict[str, object] | None = None,
) -> Path:
    """A folder in which nothing leaks: items of unequal popularity, times over 100 days, labels at random."""
    rng = np.random.default_rng(7)
    folder.mkdir(exist_ok=True)
    chosen = np.minimum(rng.geometric(0.03, EVENTS) - 1, ITEMS - 1)
    times = START + np.sort(rng.integers(0, 100 * DAY, EVENTS))
    log: dict[str, object] = {
        "event_id": np.arange(EVENTS),
        "member_id": [f"u{at}" for at in rng.integers(0, 300, EVENTS)],
        "item_id": [f"i{at}" for at in chosen],
        "timestamp": times,
        "action": ["like"] * EVENTS,
        "label": pa.array(rng.integers(0, 2, EVENTS), pa.int8()),
    }
    catalogue: dict[str, object] = {
        "item_id": [f"i{at}" for at in range(ITEMS)],
        "title": [f"Title {at}" for at in range(ITEMS)],
        "price": rng.random(ITEMS),
        "created_at": np.full(ITEMS, START),
    }
    pq.write_table(pa.table({**catalogue, **(items or {})}), folder / "items.parquet")
    pq.write_table(pa.table({**log, **(events or {})}), folder / "interactions.parquet")
    if members:
        pq.write_table(pa.table(members), folder / "members.parquet")
    meta = {"name": "clean", "cut_valid": START + 80 * DAY, "cut_test": START + 90 * DAY, "retrieval_actions": ["like"]}
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


def chosen_items(folder: Path) -> np.ndarray:
    return np.array([int(word[1:]) for word in pq.read_table(folder / "interactions.parquet")["item_id"].to_pylist()])


def kinds(folder: Path) -> list[str]:
    return [warning.kind for warning in check_folder(folder).warnings]


def test_a_clean_folder_is_counted_and_not_accused(tmp_path: Path) -> None:
    report = check_folder(clean_folder(tmp_path))
    assert report.warnings == [] and report.refused_rows == 0
    assert report.sizes["items"] == ITEMS and report.sizes["events"] == report.sizes["engagements"] == EVENTS
    assert sum(report.splits.values()) == sum(report.labels.values()) == EVENTS
    assert sum(report.history_lengths.values()) == report.sizes["members"]
    assert report.actions == {"like": EVENTS} and report.span == ("2024-10-04", "2025-01-11")
    warm = len(set(chosen_items(tmp_path)[: report.splits["train"] + report.splits["valid"]].tolist()))
    assert report.cold_items == pytest.approx(1 - warm / ITEMS)
    json.dumps(report.as_json(), allow_nan=False)


def test_each_leak_raises_its_own_warning(tmp_path: Path) -> None:
    clean_folder(tmp_path)
    chosen = chosen_items(tmp_path)
    times = pq.read_table(tmp_path / "interactions.parquet")["timestamp"].to_numpy()
    future = np.bincount(chosen[times >= START + 90 * DAY], minlength=ITEMS)
    past = np.bincount(chosen[times < START + 80 * DAY], minlength=ITEMS)
    assert kinds(clean_folder(tmp_path, items={"n_events": past, "views": future})) == ["count-columns", "foresight"]
    assert kinds(clean_folder(tmp_path, items={"views": past})) == []  # known before the cut: fair
    assert kinds(clean_folder(tmp_path, items={"created_at": np.full(ITEMS, START + 99 * DAY)})) == ["created-late"]
    answer = pa.array((chosen % 2).astype(np.int8))
    folder = clean_folder(tmp_path, items={"secret": np.arange(ITEMS) % 2}, events={"label": answer})
    assert kinds(folder) == ["label-is-a-number"]
    split = np.where(times < START + 85 * DAY, "train", "test").tolist()
    assert kinds(clean_folder(tmp_path, events={"split": split})) == ["train-after-cut", "test-before-cut"]
    assert kinds(clean_folder(tmp_path, items={"n_7d": np.arange(ITEMS)})) == ["count-columns"]
    assert kinds(clean_folder(tmp_path, events={"action": ["seen"] * EVENTS})) == ["no-engagement"]
    late = {"member_id": ["u1", "u2"], "updated": [START + 99 * DAY] * 2, "age": [20, 30]}
    assert kinds(clean_folder(tmp_path, members=late)) == ["profile-late"]
    twice = {"member_id": ["u1"] * EVENTS, "timestamp": np.full(EVENTS, START)}
    assert "repeated-events" in kinds(clean_folder(tmp_path, events=twice))


def test_a_log_of_which_nothing_counts_is_told_to_whoever_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_dataset(clean_folder(tmp_path))
    assert not caplog.records
    read_dataset(clean_folder(tmp_path, events={"action": ["seen:long", "rating:8"] * (EVENTS // 2)}))
    said = caplog.records[-1].getMessage()
    assert f"none of {EVENTS:,} events" in said and "names 'like', the actions seen are 'seen', 'rating'" in said


def test_refused_rows_and_unread_columns_are_reported(tmp_path: Path) -> None:
    items = {"place": ["x"] * ITEMS, "tags": [["a"]] * ITEMS, "title": ["ok"] * ITEMS}
    folder = clean_folder(tmp_path, items=items, events={"timestamp": np.arange(-25, EVENTS - 25)})
    report = check_folder(folder)
    assert report.ignored_columns == {"items.parquet": ["place", "tags"]}
    assert report.refused == {"interactions.parquet: timestamp is negative": 25}
    assert len(report.first_refusals) == 20
    assert report.first_refusals[3] == "interactions.parquet row 3: timestamp is negative (seen: -22)"


def test_the_command_prints_one_json_object_or_a_page(tmp_path: Path) -> None:
    title = ["[red]bold[/red]\x1b[31m"] * ITEMS
    folder = clean_folder(tmp_path, items={"title": title, "n_pos": [1] * ITEMS})
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["check", str(folder), "--json"]).stdout)
    assert found["sizes"]["events"] == EVENTS and found["warnings"][0]["kind"] == "count-columns"
    page = runner.invoke(app, ["check", str(folder)])
    assert page.exit_code == 0 and "2,000" in page.stdout and "count-columns" in page.stdout


def test_the_commands_write_a_folder_that_can_be_checked(tmp_path: Path) -> None:
    runner = CliRunner()
    (tmp_path / "shop.csv").write_text("name,words\nMug,brown\nCup,\nbroken\n")
    asked = ["import", "csv", "--items", str(tmp_path / "shop.csv"), "--map", "title=name", "--map", "text=words"]
    done = runner.invoke(app, [*asked, str(tmp_path / "shop"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["check"]["sizes"]["items"] == 2 and found["check"]["name"] == "shop"
    assert sum(found["source_rows_refused"].values()) == 1
    source = tmp_path / "tweets"
    source.mkdir()
    (source / "movies.dat").write_text("1::A (2000)::Drama\n")
    (source / "ratings.dat").write_text(f"1::1::9::{START}\n")
    done = runner.invoke(app, ["import", "movietweets", str(source), str(tmp_path / "tiny")])
    assert done.exit_code == 0 and "written" in done.stderr and "Drama" not in done.stderr
    assert check_folder(tmp_path / "tiny").sizes["events"] == 1


def test_every_importer_has_a_command_that_teaches() -> None:
    runner = CliRunner()
    assert set(KINDS) == set(IMPORTERS)
    for command in (["check"], ["world"], ["import"], ["import", "csv"], *(["import", kind] for kind in KINDS)):
        page = runner.invoke(app, [*command, "--help"]).stdout
        assert "brewline data" in page or command == ["import"], command
