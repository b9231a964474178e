from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from typer.testing import CliRunner

from index.bench import made_items, made_queries
from index.build import Plan, build_index
from index.certified_codes import code
from index.recipe import BuildError, Recipe
from index.tune import TuneError, Wishes, candidates, choose, frontier, on_gpu, predict, read_choice
from ranking.cli.main import app


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(0, True), Recipe(16), Recipe(16, True), Recipe(16, short=True)])
def test_the_weight_is_foretold(recipe: Recipe) -> None:
    vectors = made_items(4_000, 16)
    written = faiss.serialize_index(build_index(vectors, recipe, 0)).nbytes
    foretold = predict(4_000, 16, recipe)
    assert foretold.memory - vectors.nbytes * recipe.short == pytest.approx(written, rel=0.02)
    assert foretold.disk == foretold.memory + vectors.nbytes * (not recipe.short)


def test_the_codes_of_the_certified_scan_are_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = made_items(40_000, 18)
    monkeypatch.setattr("index.serving.fastest_way", lambda _: "int8")
    with_codes = predict(40_000, 18, Recipe())
    monkeypatch.setattr("index.serving.fastest_way", lambda _: "float32")
    plain = predict(40_000, 18, Recipe())
    assert with_codes.memory - plain.memory == code(vectors).bytes and with_codes.disk == plain.disk


def test_the_quickest_that_reaches_the_target_is_chosen(tmp_path: Path) -> None:
    vectors, queries = made_items(6_000, 16), made_queries(16, 16, 0)
    wishes = Wishes(k=100, target=0.9, seed=3)
    points = list(frontier(vectors, queries, [Recipe(), Recipe(32)], wishes, "members"))
    assert points[0].recall == 1 and points[0].nprobe == 0
    lists = [point for point in points if point.recipe == "IVF32,Flat"]
    assert [point.recall for point in lists] == sorted(point.recall for point in lists) and len(lists) > 2
    choice = choose(points, wishes, 6_000, 16, "members")
    assert choice.measured.recall >= 0.9
    assert choice.measured.p50_ms == min(point.p50_ms for point in points if point.recall >= 0.9)
    choice.write(tmp_path / "recipe.json")
    assert read_choice(tmp_path / "recipe.json") == Plan(Recipe.parse(choice.recipe), 100, 0.9, 3, 6_000, 16)
    with pytest.raises(TuneError, match="needs"):
        choose(points, Wishes(k=100, target=0.9, most_ms=1e-6), 6_000, 16, "members")
    with pytest.raises(TuneError, match="no index reaches"):
        choose(lists[:1], Wishes(k=100, target=1.0), 6_000, 16, "members")


def test_what_does_not_fit_is_not_built() -> None:
    everything = candidates(1_000_000, 128, Wishes())
    fitting = candidates(1_000_000, 128, Wishes(most_bytes=300_000_000))
    assert len(everything) == 12 and fitting and all(recipe.half for recipe in fitting)
    with pytest.raises(TuneError, match="256000000 bytes"):
        candidates(1_000_000, 128, Wishes(most_bytes=1_000))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"recipe": "PQ", "k": 1, "target": 0.9, "seed": 0}',
        '{"recipe": "Flat", "k": 0, "target": 0.9, "seed": 0}',
    ],
)
def test_damaged_recipe_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(TuneError, match="recipe file"):
        read_choice(tmp_path / "recipe.json")


@pytest.mark.parametrize(("count", "dims"), [(1_499, 16), (24_001, 16), (6_000, 8), (0, 16)])
def test_a_plan_for_other_vectors_is_refused(count: int, dims: int) -> None:
    plan = Plan(Recipe(32), items=6_000, dims=16)
    for fitting in (1_500, 6_000, 24_000):
        plan.require(fitting, 16)
    Plan().require(count, dims)
    with pytest.raises(BuildError, match=f"there are {count:,} x {dims}"):
        plan.require(count, dims)


@pytest.mark.skipif("StandardGpuResources" in dir(faiss), reason="faiss-gpu is installed")
def test_a_gpu_is_asked_for_in_vain() -> None:
    with pytest.raises(TuneError, match="extra `gpu`"):
        on_gpu(faiss.IndexFlatIP(4))


def test_the_command(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", made_queries(20, 8, 0))
    arguments = ["index", "tune", "--items", "3000", "--dims", "8", "--k", "50", "--asked", "8", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--queries", str(tmp_path / "q.npy"), "--out", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["source"] == "members" and told["choice"]["measured"]["recall"] >= 0.95 and told["predicted"]
    assert str(read_choice(tmp_path / "r.json").recipe) == told["choice"]["recipe"]
