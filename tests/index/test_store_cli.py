"""`brewline index ...` tells in JSON what the store holds, what is broken, what changed, and what it swept away."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from index.live import LIVE_DIR, LiveIndex
from index.publish import publish
from index.snapshot import Snapshot
from index.wal import segments
from ranking.cli.main import app


def run(*words: str, store: Path, code: int = 0) -> dict:
    done = CliRunner().invoke(app, ["index", *words, "--store", str(store), "--json"], catch_exceptions=code != 0)
    assert (done.exit_code == 0) == (code == 0), done.output
    return json.loads(done.stdout.splitlines()[0])


@pytest.fixture
def two(make_snapshot, store: Path, unit) -> tuple[str, str]:
    vectors = unit(40, 8)
    before = make_snapshot(vectors=vectors)
    moved = vectors.copy()
    moved[3] = vectors[4]
    ids = [f"item-{row}" for row in range(39)] + ["new"]
    after = make_snapshot(vectors=moved, ids=ids, as_of=1_700_086_400)
    publish(store, before.name)
    publish(store, after.name)
    return before.name, after.name


def test_every_command_prints_one_json_object(two: tuple[str, str], store: Path) -> None:
    before, after = two
    listed = run("list", store=store)["snapshots"]
    assert [(one["name"], one["current"], one["rollback"]) for one in listed] == [(before, False, True), (after, True, False)]
    shown = run("show", store=store)
    assert (shown["name"], shown["count"], shown["dims"]) == (after, 40, 8)
    verified = run("verify", before, store=store)
    assert verified["passed"] and verified["name"] == before
    assert set(verified["gates"][0]) == {"name", "passed", "seen", "expected"}
    assert run("rollback", store=store) == {"served": before}
    assert [(one["name"], one["in_line"]) for one in run("list", store=store)["snapshots"]] == [(before, True), (after, False)]
    assert run("gc", "--keep", "0", store=store) == {"removed": [after]}


def test_diff_names_what_came_went_and_moved(two: tuple[str, str], store: Path, make_snapshot) -> None:
    before, after = two
    found = run("diff", store=store)
    assert (found["before"], found["after"], found["same_encoder"], found["parts"]) == (before, after, True, [])
    assert (found["added_ids"], found["removed_ids"], found["kept"], found["moved"]) == (["new"], ["item-39"], 39, 1)
    assert 0 < found["largest"] <= 2
    same = run("diff", before, before, store=store)
    assert (same["added"], same["removed"], same["moved"], same["largest"]) == (0, 0, 0, 0.0)
    other = make_snapshot(fingerprint="another").name
    assert run("diff", before, other, store=store)["moved"] is None
    table = CliRunner().invoke(app, ["index", "diff", "--store", str(store)])
    assert table.exit_code == 0 and "item-39" in table.stdout


@pytest.mark.parametrize("name", ["vectors.npy", "MANIFEST.json", "index.faiss"])
def test_verify_says_in_json_what_is_broken_and_fails(two: tuple[str, str], store: Path, name: str) -> None:
    path = store / "snapshots" / two[1] / name
    os.truncate(path, path.stat().st_size - 1)
    found = run("verify", store=store, code=2)
    assert not found["passed"] and name in found["gates"][0]["seen"]


def test_verify_reads_the_changes_since(two: tuple[str, str], store: Path) -> None:
    snapshot = Snapshot.open(store / "snapshots" / two[1])
    with LiveIndex(snapshot, store, write=True) as live:
        live.upsert(["a", "b"], [b"", b""], snapshot.vectors[:2], "encoder-one")
        live.withdraw(["b", "new"])
    gate = run("verify", store=store)["gates"][-1]
    assert gate["name"] == "live log" and gate["seen"].startswith("1 items put in and 2 withdrawn")
    path = segments(store / LIVE_DIR)[0][1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = run("verify", store=store, code=2)
    assert [one["name"] for one in found["gates"] if not one["passed"]] == ["live log"]
