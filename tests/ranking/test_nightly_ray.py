"""`brewline nightly --ray`: what changed is encoded by Ray's workers, and the snapshot is the one that would have been anyway."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ranking.cli.main import app
from retrieval.cluster import ClusterError
from retrieval.data.schema import Dataset
from retrieval.llama import Size
from retrieval.packed_bench import made_encoder

RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(scope="module")
def encoder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("night") / "encoder"
    made_encoder(tiny_dataset, Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48), "mean", 0, folder)
    return folder


def words(data: Path, encoder: Path, store: Path, as_of: str) -> list[str]:
    named = ["nightly", str(data), "--encoder", str(encoder), "--store", str(store)]
    return [*named, "--as-of", as_of, "--hysteresis", "3", "--json"]


def test_without_ray_nothing_is_begun_and_the_extra_is_named(
    encoder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails then, as it does where it is not installed
    done = CliRunner().invoke(app, [*words(tiny_folder, encoder, tmp_path / "store", "end"), "--ray", "local"])
    assert isinstance(done.exception, ClusterError) and "pip install 'brewline[cluster]'" in str(done.exception)
    assert not (tmp_path / "store").exists()


def test_workers_without_a_cluster_are_refused(encoder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*words(tiny_folder, encoder, tmp_path / "store", "end"), "--ray-workers", "2"])
    assert done.exit_code == 2 and "workers of a Ray cluster" in done.output
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(not RAY, reason="needs Ray (extra cluster)")
def test_the_next_night_on_a_local_ray_publishes_the_snapshot_of_the_night_without(
    encoder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """In a process of its own: Ray asks the machine for its address, which the guard of these tests forbids."""
    here, there = tmp_path / "here", tmp_path / "there"
    assert CliRunner().invoke(app, words(tiny_folder, encoder, here, "2024-01-18")).exit_code == 0
    shutil.copytree(here, there)
    plain = CliRunner().invoke(app, words(tiny_folder, encoder, here, "2024-01-19"))
    asked = [*words(tiny_folder, encoder, there, "2024-01-19"), "--ray", "local", "--ray-workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "ranking.cli.main", *asked], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    (line,) = done.stdout.splitlines()
    far, near = json.loads(line), json.loads(plain.stdout)
    assert (near["embedded_by"], far["embedded_by"]) == ("this process", "ray")
    same = ("snapshot", "items", "embedded", "published", "members", "members_encoded", "index")
    assert {name: far[name] for name in same} == {name: near[name] for name in same} and 0 < far["embedded"] < 60
    assert "items: " in done.stderr, "progress is told there"


@pytest.mark.skipif(not RAY, reason="needs Ray (extra cluster)")
def test_a_night_in_which_nothing_changed_starts_no_ray(encoder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which would end at `ray.init`."""
    asked = words(tiny_folder, encoder, tmp_path / "store", "2024-01-19")
    first = json.loads(CliRunner().invoke(app, asked).stdout)
    program = "import sys, ray; ray.init = None; from ranking.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *asked, "--ray", "local"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    again = json.loads(done.stdout)
    assert (again["snapshot"], again["embedded"], again["embedded_by"]) == (first["snapshot"], 0, "ray")
