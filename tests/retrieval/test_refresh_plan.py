"""A night builds the index that was tuned for it, and tells how far it drifted from the night before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from index.build import Plan
from index.check import GateFailed
from index.publish import current
from index.recipe import BuildError, Recipe
from index.snapshot import Snapshot
from index.tune import Choice, Point, TuneError, Weight
from ranking.cli.main import app
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import NightReport, SnapshotForm, nightly

TUNED = Plan(Recipe(4), k=20, target=0.8, seed=3, items=50, dims=32)


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


def served(store: Path) -> Snapshot:
    path = current(store)
    assert path is not None
    return Snapshot.open(path)


def one_item_less(dataset: Dataset) -> Dataset:
    """The last item has another id: nobody finds it any more."""
    return replace(dataset, items=replace(dataset.items, item_id=[*dataset.items.item_id[:-1], "newcomer"]))


def test_the_tuned_index_is_built_and_recorded(tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path) -> None:
    report = nightly(tiny_dataset, encoder, None, tmp_path, end_of(tiny_dataset), form=SnapshotForm(plan=TUNED))
    facts = served(tmp_path).manifest
    assert report.index == facts.recipe == "IVF4,Flat" and facts.recall is not None and facts.recall.k == 20
    told = {"seed": 3, "target_recall": 0.8, "target_k": 20, "tuned_items": 50, "tuned_dims": 32}
    assert told.items() <= dict(facts.build).items()


@pytest.mark.parametrize("changed", [{"dims": 16}, {"items": 14}, {"items": 241}])
def test_a_plan_for_other_vectors_stops_the_night_before_it_encodes(
    tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path, changed: dict[str, int]
) -> None:
    told: list[str] = []
    with pytest.raises(BuildError, match="there are 60 x 32"):
        nightly(
            tiny_dataset,
            encoder,
            None,
            tmp_path,
            end_of(tiny_dataset),
            progress=lambda stage, _done, _of: told.append(stage),
            form=SnapshotForm(plan=replace(TUNED, **changed)),
        )
    assert not told and current(tmp_path) is None


def test_the_command_reads_what_tune_wrote(tiny_folder: Path, encoder_folders: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, metrics = tmp_path / "recipe.json", tmp_path / "night.prom"
    point = Point("IVF4,Flat", 2, 0.9, 0.8, 1.0, 1.0, Weight(1, 1))
    Choice("IVF4,Flat", 20, 0.8, 3, 60, 32, 60, "members", point).write(recipe)
    night = ["nightly", tiny_folder, "--encoder", encoder_folders[0], "--store", tmp_path / "store", "--as-of", "end"]
    options = ["--recipe", recipe, "--least-overlap", 0.9, "--metrics", metrics, "--json"]
    for overlap in (None, 1.0):
        done = CliRunner().invoke(app, [str(word) for word in (*night, *options)])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["index"] == "IVF4,Flat" and told["overlap"] == overlap
    values = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.read_text())
        for sample in family.samples
    }
    assert values["brewline_night_overlap", ("60", "mean")] == values["brewline_night_overlap", ("60", "p5")] == 1
    recipe.write_text("{}")
    refused = CliRunner().invoke(app, [str(word) for word in (*night, *options)])
    assert isinstance(refused.exception, TuneError) and "recipe.json" in str(refused.exception)


def test_drift_is_told_and_stops_a_night_if_it_is_to(
    tiny_dataset: Dataset, encoder: Encoder, encoder_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    moment = end_of(tiny_dataset)

    def night(dataset: Dataset, after: int, reader: Encoder = encoder, least: float = 0.99) -> NightReport:
        return nightly(dataset, reader, None, tmp_path, moment + after, least_overlap=least)

    first = night(tiny_dataset, 0)
    assert (first.overlap, first.overlap_k) == (None, 0)
    assert night(tiny_dataset, 0).overlap == night(tiny_dataset, 10).overlap == 1
    before = served(tmp_path).name
    with pytest.raises(GateFailed, match=r"overlap: saw 0\.983333 of yesterday's best 60.*at least 0\.99"):
        night(one_item_less(tiny_dataset), 20)
    assert served(tmp_path).name == before
    moved = night(one_item_less(tiny_dataset), 20, least=0)
    assert moved.published and moved.overlap == pytest.approx(59 / 60, abs=1e-6) and moved.overlap_k == 60
    assert night(tiny_dataset, 30, Encoder.load(encoder_folders[1])).overlap is None, "another encoder answers other questions"
