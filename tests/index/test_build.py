from __future__ import annotations

import faiss
import numpy as np
import pytest

from index.build import build, build_index, least_probes, summarise
from index.exact import exact_search
from index.recipe import BuildError, Recipe, choose_recipe
from index.search import Searcher


def test_small_is_flat_and_lists_grow_with_the_root() -> None:
    assert str(choose_recipe(0, 8)) == str(choose_recipe(99_999, 768)) == str(choose_recipe(400_000, 16)) == "Flat"
    counts = (100_000, 1_000_000, 100_000_000)
    assert [str(choose_recipe(count, 128)) for count in counts] == [f"IVF{n},ShortList" for n in (1024, 4096, 32768)]
    assert [str(choose_recipe(count, 128, "float16")) for count in counts] == [f"IVF{n},SQfp16" for n in (512, 2048, 16384)]
    assert [str(choose_recipe(1_000_000, 128, "int8")), str(choose_recipe(9, 8, "float16"))] == ["IVF2048,Flat", "SQfp16"]


@pytest.mark.parametrize("text", ["Flat", "SQfp16", "IVF256,Flat", "IVF1,SQfp16", "IVF256,ShortList"])
def test_recipes_survive_text(text: str) -> None:
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "flat", "IVF0,Flat", "IVF256", "IVF256,PQ8", "ShortList", "IVF0,ShortList", "IVF-1,Flat", "Flat\n", "IVF٣,Flat"]
)
def test_unknown_recipes_are_refused(text: str) -> None:
    with pytest.raises(BuildError, match="recipe"):
        Recipe.parse(text)


def test_the_same_seed_gives_the_same_index(unit) -> None:
    vectors = unit(600, 8)
    first, same, other = (faiss.serialize_index(build_index(vectors, Recipe(8), seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_half_precision_and_mapped_vectors_will_do(unit, tmp_path) -> None:
    np.save(tmp_path / "v.npy", unit(100, 8).astype(np.float16))
    index = build_index(np.load(tmp_path / "v.npy", mmap_mode="r"), Recipe(), 0)
    assert index.ntotal == 100 and index.metric_type == faiss.METRIC_INNER_PRODUCT


def test_vectors_that_cannot_be_indexed(unit) -> None:
    vectors = unit(20, 4)
    with pytest.raises(BuildError, match="IVF21,Flat needs at least 21"):
        build_index(vectors, Recipe(21), 0)
    vectors[7] = np.inf
    for recipe in (Recipe(), Recipe(4)):
        with pytest.raises(BuildError, match="vector 7"):
            build_index(vectors, recipe, 0)
    many = unit(2_000, 4)
    many[1_007] = np.nan
    with pytest.raises(BuildError, match="vector 1007"):
        build_index(many, Recipe(4, short=True), 0)
    for wrong in (np.ones((3, 0), np.float32), np.ones(3, np.float32), np.ones((3, 2), np.int32)):
        with pytest.raises(BuildError, match="expected floats"):
            build_index(wrong, Recipe(), 0)


def test_nprobe_is_the_least_that_reaches_the_target(unit) -> None:
    vectors, queries = unit(4_000, 16), unit(32, 16, 9)
    search, true = Searcher(build_index(vectors, Recipe(64), 0), nprobe=1), exact_search(vectors, queries, 20)
    found = [(least_probes(search, 64, vectors, queries, true, target, "members"), search.nprobe) for target in (0.5, 0.98, 1.0)]
    (loose, few), (tight, many), (perfect, everything) = found
    assert 1 <= few < many <= 64 and loose.mean >= 0.5 and tight.mean >= 0.98
    assert tight.source == "members" and tight.p5 <= tight.mean
    assert perfect.mean == 1.0 and everything <= 64


def test_a_short_list_is_built_measured_and_found_again(unit) -> None:
    vectors, queries = unit(40_000, 16), unit(32, 16, 9)
    parts = [np.arange(0, 40_000, 2), np.arange(1, 40_000, 2)]
    for shards in ((), parts):
        built = build(vectors, recipe=Recipe(64, short=True), k=50, target=0.9, queries=queries, shards=shards)
        assert built.recall is not None and 0.9 <= built.recall.mean < 1 and float(built.facts["margin@100"]) != 0
        true = exact_search(vectors, queries, 50)
        assert summarise(vectors, queries, built.search.search(queries, 50), true, "members") == built.recall


def test_a_target_that_a_short_list_cannot_reach_is_refused(unit) -> None:
    with pytest.raises(BuildError, match=r"with all its lists, 1\.0 is asked"):
        build(unit(40_000, 16), recipe=Recipe(64, short=True), k=5_000, target=1.0, queries=unit(32, 16, 9))


def test_build_records_what_it_did(unit) -> None:
    seen: list[tuple[int, int]] = []
    built = build(
        unit(2_000, 8), recipe=Recipe(16), seed=5, k=50, queries=unit(40, 8, 9), progress=lambda *pair: seen.append(pair)
    )
    assert built.facts["training_rows"] == 1_024 and built.facts["seed"] == 5 and seen == [(2_000, 2_000)]
    assert built.recall is not None and built.recall.mean >= 0.95
    assert (built.recall.k, built.recall.queries, built.recall.source) == (50, 40, "members")
    assert isinstance(built.search, Searcher) and built.search.nprobe == built.facts["nprobe"] > 0
    empty = build(np.zeros((0, 8), np.float32))
    assert empty.recall is None and str(empty.recipe) == "Flat"
