"""A night in shards gives the answers of the night, whatever the night before was divided in, and is told and looked after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from index.build import Plan
from index.publish import current
from index.recipe import BuildError, Recipe
from index.snapshot import Snapshot
from ranking.cli.main import app
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.records import records_of, view_of
from retrieval.refresh import PLAIN, NightReport, SnapshotForm, nightly
from retrieval.retrieve import Retriever


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


def served(store: Path) -> Snapshot:
    path = current(store)
    assert path is not None
    return Snapshot.open(path)


@pytest.mark.parametrize("codes", ["float32", "float16", "int8"])
def test_the_next_night_may_have_another_number_of_shards(
    tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path, codes: Any
) -> None:
    moment, seen = end_of(tiny_dataset), {}
    nightly(tiny_dataset, encoder, None, tmp_path / "whole", moment, form=SnapshotForm(codes))
    whole = served(tmp_path / "whole")
    records = [record for record in records_of(tiny_dataset, moment) if record.history][:6]

    def night(shards: int) -> NightReport:
        return nightly(tiny_dataset, encoder, None, tmp_path / "store", moment, form=SnapshotForm(codes, shards=shards))

    for shards, before in ((3, 0), (7, 3), (1, 7), (2, 1), (2, 2)):
        report = night(shards)
        assert (report.shards, report.shards_before, report.embedded) == (shards, before, 0 if before else 60)
        assert report.published == (shards != before), "the same night makes the same snapshot"
        snapshot = served(tmp_path / "store")
        seen[shards] = snapshot
        np.testing.assert_allclose(snapshot.vectors, whole.vectors, atol=1e-6)
        for record in records:
            ours, theirs = (
                retriever.retrieve(retriever.describe(view), 20, [done.item.item_id for done in view.history])
                for retriever in (Retriever.of(snapshot, encoder), Retriever.of(whole, encoder))
                for view in [view_of(record, retriever.catalog)]
            )
            assert ours.ids == theirs.ids
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    assert [len(one.manifest.shards) for one in seen.values()] == [3, 7, 0, 2]


def test_a_new_item_moves_no_other(tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path) -> None:
    def homes() -> dict[str, int]:
        snapshot = served(tmp_path)
        return {item_id: place for place, shard in enumerate(snapshot.shards) for item_id in snapshot.ids.many(shard.rows)}

    form, moment = SnapshotForm(shards=4), end_of(tiny_dataset)
    nightly(tiny_dataset, encoder, None, tmp_path, moment, form=form)
    before, items = homes(), tiny_dataset.items
    renamed = replace(tiny_dataset, items=replace(items, item_id=["newcomer", *items.item_id[1:]]))
    report = nightly(renamed, encoder, None, tmp_path, moment + DAY, form=form)
    after = homes()
    assert report.published and set(after) - set(before) == {"newcomer"}
    assert all(after[item_id] == place for item_id, place in before.items() if item_id in after)


def test_a_plan_is_held_against_the_shards(tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path) -> None:
    plan = Plan(Recipe(4), k=20, target=0.8, items=20, dims=32)
    report = nightly(tiny_dataset, encoder, None, tmp_path, end_of(tiny_dataset), form=SnapshotForm(plan=plan, shards=3))
    assert report.index == "IVF4,Flat" and [shard.index.nlist for shard in served(tmp_path).shards] == [4] * 3
    assert report.recall is not None and report.recall >= 0.8
    wrong = SnapshotForm(plan=replace(plan, items=81), shards=3)
    with pytest.raises(BuildError, match="measured on 81 x 32, there are 20 x 32"):
        nightly(tiny_dataset, encoder, None, tmp_path, end_of(tiny_dataset), form=wrong)
    assert PLAIN.divided(["a", "b"]) == ()


def test_commands_make_and_look_after_a_divided_snapshot(
    tiny_folder: Path, encoder_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, (words, done.output, done.exception)
        return done.stdout

    night = ("nightly", tiny_folder, "--encoder", encoder_folders[0], "--store", store, "--as-of", "end")
    first = json.loads(run(*night, "--json"))
    assert (first["shards"], first["shards_before"]) == (1, 0)
    told = " ".join(run(*night, "--shards", 3).split())
    assert "3 by the hash of the id" in told and "not divided the night before" in told.replace("│ ", "").replace("│", "")
    shown = json.loads(run("index", "show", "--store", store, "--json"))
    assert len(shown["shards"]) == 3 and sum(shown["shards"]) == shown["count"] == 60 and shown["format_version"] == 2
    verified = json.loads(run("index", "verify", "--store", store, "--json"))
    assert verified["passed"] and "shards" in [gate["name"] for gate in verified["gates"]]
    difference = json.loads(run("index", "diff", "--store", store, "--json"))
    assert (difference["kept"], difference["moved"], difference["parts"]) == (60, 0, [])
    names = [
        one["name"] for one in json.loads(run("index", "list", "--store", store, "--json"))["snapshots"] if not one["problem"]
    ]
    assert names == [first["snapshot"], shown["name"]]
    assert json.loads(run("index", "rollback", "--store", store, "--json"))["served"] == first["snapshot"]
    assert json.loads(run("index", "gc", "--store", store, "--keep", 0, "--json"))["removed"] == [shown["name"]]
