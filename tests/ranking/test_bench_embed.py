"""`brewline bench embed`: both read the same texts, agree, and the figures are what the seconds say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ranking.cli.main import app
from retrieval.data.schema import Dataset
from retrieval.llama import Size
from retrieval.packed_bench import made_encoder


def bench(*words: str) -> dict:
    done = CliRunner().invoke(app, ["bench", "embed", "--json", "--rounds", "1", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def encoder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "encoder"
    made_encoder(tiny_dataset, Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48), "mean+last", 0, folder)
    return folder


def test_both_read_the_same_texts_and_find_the_same(encoder: Path, tiny_folder: Path) -> None:
    found = bench("--encoder", str(encoder), "--data", str(tiny_folder), "--texts", "40")
    assert (found["texts"], found["queries"], found["top10_same"]) == (40, 10, 1.0)
    assert found["cosine_min"] > 0.9999 and found["largest_difference"] < 1e-5
    assert found["tokens"] > 40 * 5 and found["pooling"] == "mean+last" and found["precision"] == "float32"
    assert found["peer_seconds"] == min(found["peer_seconds_by_batch"].values())
    assert found["ratio"] == pytest.approx(found["peer_seconds"] / found["seconds"])
    assert found["texts_per_s"] == pytest.approx(40 / found["seconds"])
    assert list(found["peer_seconds_by_batch"]) == ["16", "32", "64", "128", "256"]


def test_random_weights_and_bfloat16(tiny_folder: Path) -> None:
    shape = ["--hidden=32", "--layers=1", "--heads=2", "--kv-heads=1", "--mlp=48", "--pooling=last"]
    words = [*shape, "--precision=bfloat16", "--texts=2"]
    found = bench("--data", str(tiny_folder), *words)
    assert (found["hidden"], found["pooling"], found["precision"], found["queries"]) == (32, "last", "bfloat16", 0)
    assert found["cosine_min"] > 0.99
