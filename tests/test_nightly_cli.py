"""What `brewline nightly` tells machines: one JSON line, and a metrics file that is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from index.check import GateFailed
from ranking.cli.main import app
from ranking.cli.night_metrics import MetricsError
from retrieval.data.schema import Dataset
from retrieval.llama import Size
from retrieval.packed_bench import made_encoder


@pytest.fixture(scope="module")
def encoder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("night") / "encoder"
    made_encoder(tiny_dataset, Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48), "mean", 0, folder)
    return folder


def samples(path: Path) -> dict[str, float]:
    """Name and labels -> value, as Prometheus reads the file."""
    families = text_string_to_metric_families(path.read_text(encoding="utf-8"))
    return {" ".join([one.name, *one.labels.values()]): one.value for family in families for one in family.samples}


def test_one_json_line_and_a_metrics_file_that_agree(encoder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "brewline.prom"
    words = ["nightly", str(tiny_folder), "--encoder", str(encoder), "--store", str(tmp_path / "store"), "--hysteresis", "3"]
    told = []
    for moment in ("2024-01-18", "2024-01-19"):
        done = CliRunner().invoke(app, [*words, "--as-of", moment, "--metrics", str(file), "--json"])
        assert done.exit_code == 0, done.output
        (line,) = done.stdout.splitlines()
        told.append(json.loads(line))
    first, second = told
    assert {"items", "embedded", "seconds", "seconds_embed", "snapshot"} <= second.keys()
    assert first["embedded"] == first["items"] == second["items"] == 60 and 0 < second["embedded"] < 60
    assert 0 < second["seconds_embed"] < second["seconds"] and second["hysteresis"] == 3
    found = samples(file)
    assert found["brewline_night_items"] == 60 and found["brewline_night_embedded"] == second["embedded"]
    assert found["brewline_night_stage_seconds embed"] == second["seconds_embed"]
    assert found["brewline_night_as_of_seconds"] == second["as_of"] < found["brewline_night_end_seconds"]
    assert found[f"brewline_night_recall {second['recall_k']}"] == second["recall"]
    info = next(name for name in found if name.startswith("brewline_night_info"))
    assert second["snapshot"] in info and first["snapshot"] in info
    assert [one.name for one in tmp_path.iterdir() if "prom" in one.name] == ["brewline.prom"], "nothing is left beside it"


def test_a_night_that_publishes_nothing_leaves_the_metrics_of_the_last_one(
    encoder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "brewline.prom"
    words = ["nightly", str(tiny_folder), "--encoder", str(encoder), "--store", str(tmp_path / "store"), "--metrics", str(file)]
    assert CliRunner().invoke(app, [*words, "--as-of", "2024-01-18"]).exit_code == 0
    before = file.read_bytes()
    early = CliRunner().invoke(app, [*words, "--as-of", "2023-12-24"])
    assert isinstance(early.exception, GateFailed) and "count" in str(early.exception)
    assert file.read_bytes() == before


def test_a_metrics_file_without_a_folder_is_refused_before_the_night(encoder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    words = ["nightly", str(tiny_folder), "--encoder", str(encoder), "--store", str(tmp_path / "store")]
    done = CliRunner().invoke(app, [*words, "--metrics", str(tmp_path / "nowhere" / "night.prom")])
    assert isinstance(done.exception, MetricsError) and "nowhere" in str(done.exception)
    assert not (tmp_path / "store").exists()
