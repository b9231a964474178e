from __future__ import annotations

import faiss
import numpy as np
import pytest

from index.build import BuildError, Recipe, build, build_index, choose_nprobe, choose_recipe


def test_small_is_flat_and_lists_grow_with_the_root() -> None:
    assert str(choose_recipe(0, 8)) == str(choose_recipe(99_999, 768)) == str(choose_recipe(400_000, 16)) == "Flat"
    lists = [choose_recipe(count, 128).lists for count in (100_000, 1_000_000, 100_000_000)]
    assert lists == [512, 2048, 16384]


@pytest.mark.parametrize("text", ["Flat", "IVF256,Flat", "IVF1,Flat"])
def test_recipes_survive_text(text: str) -> None:
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize("text", ["", "flat", "IVF0,Flat", "IVF256", "IVF256,PQ8", "IVF-1,Flat", "Flat\n", "IVF٣,Flat"])
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
    for wrong in (np.ones((3, 0), np.float32), np.ones(3, np.float32), np.ones((3, 2), np.int32)):
        with pytest.raises(BuildError, match="expected floats"):
            build_index(wrong, Recipe(), 0)


def test_nprobe_is_the_least_that_reaches_the_target(unit) -> None:
    vectors, queries = unit(4_000, 16), unit(32, 16, 9)
    index = build_index(vectors, Recipe(64), 0)
    loose, loose_recall = choose_nprobe(index, vectors, queries, 20, 0.5, "members")
    tight, tight_recall = choose_nprobe(index, vectors, queries, 20, 0.98, "members")
    assert 1 <= loose < tight <= 64 and loose_recall.mean >= 0.5 and tight_recall.mean >= 0.98
    assert tight_recall.source == "members" and tight_recall.p5 <= tight_recall.mean
    everything, perfect = choose_nprobe(index, vectors, queries, 20, 1.0, "members")
    assert perfect.mean == 1.0 and everything <= 64


def test_build_records_what_it_did(unit) -> None:
    seen: list[tuple[int, int]] = []
    built = build(
        unit(2_000, 8), recipe=Recipe(16), seed=5, k=50, queries=unit(40, 8, 9), progress=lambda *pair: seen.append(pair)
    )
    assert built.facts["training_rows"] == 1_024 and built.facts["seed"] == 5 and seen == [(2_000, 2_000)]
    assert built.recall is not None and built.recall.mean >= 0.95
    assert (built.recall.k, built.recall.queries, built.recall.source) == (50, 40, "members")
    assert built.searcher().nprobe == built.facts["nprobe"] > 0
    empty = build(np.zeros((0, 8), np.float32))
    assert empty.recall is None and str(empty.recipe) == "Flat"
