"""Fewer bits for the same directions: what is lost is bounded, and coding twice loses nothing more."""

from __future__ import annotations

import numpy as np
import pytest

from index.build import build
from index.check import run_gates
from index.codes import CODES, CodesError, codes_named, decode_rows, encode_rows, rounded
from index.manifest import SnapshotTorn
from index.recipe import BuildError, Recipe
from index.search import Searcher
from index.snapshot import VECTORS_FILE, Snapshot
from index.writer import SnapshotWriter


@pytest.mark.parametrize(("codes", "worst"), [("float32", 0), ("float16", 5e-4), ("int8", 1e-2)])
def test_little_is_lost_and_nothing_more_the_second_time(unit, codes, worst) -> None:
    vectors = unit(500, 24)
    once = rounded(vectors, codes)
    assert once.dtype == np.float32 and np.abs(once - vectors).max() <= worst
    np.testing.assert_array_equal(encode_rows(once, codes), encode_rows(vectors, codes))
    np.testing.assert_array_equal(rounded(once, codes), once)


def test_int8_vectors_are_unit_and_each_depends_on_itself_alone(unit) -> None:
    vectors = unit(50, 24)
    coded = rounded(vectors, "int8")
    np.testing.assert_allclose(np.linalg.norm(coded, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rounded(vectors[7:8], "int8")[0], coded[7])
    np.testing.assert_array_equal(
        decode_rows(np.array([[127, 0], [-3, 4]], np.int8), "int8"), np.array([[1, 0], [-0.6, 0.8]], np.float32)
    )


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_vector_without_a_direction_has_no_int8_codes(unit, bad) -> None:
    vectors = unit(5, 4)
    vectors[3] = bad
    with pytest.raises(CodesError, match="vector 3"):
        encode_rows(vectors, "int8")


def test_unknown_codes_are_refused() -> None:
    assert [codes_named(name) for name in CODES] == list(CODES)
    with pytest.raises(CodesError, match="float32, float16, int8"):
        codes_named("int4")


@pytest.mark.parametrize(
    ("codes", "recipe"), [("float16", "SQfp16"), ("float16", "IVF8,SQfp16"), ("int8", "Flat"), ("int8", "IVF8,Flat")]
)
def test_a_snapshot_gives_the_scores_of_what_it_keeps(unit, store, codes, recipe) -> None:
    vectors, queries = unit(300, 16), unit(20, 16, 3)
    with SnapshotWriter(store, fingerprint="one", as_of=1_700_000_000) as writer:
        built = build(vectors, recipe=Recipe.parse(recipe), codes=codes, k=50)
        assert str(built.recipe) == recipe
        writer.vectors(vectors, codes)
        writer.ids([f"i{row}" for row in range(300)])
        writer.index(built.index, recipe=recipe, facts=built.facts, recall=built.recall)
    snapshot = Snapshot.open(writer.path)
    assert snapshot.manifest.dtype == codes and np.load(writer.path / VECTORS_FILE).dtype == codes
    kept = rounded(vectors, codes)
    np.testing.assert_array_equal(snapshot.vectors, kept)
    for exclude in (None, [np.arange(0, 300, 2)] * 20, [np.arange(5, 300)] * 20):
        hits = Searcher.of(snapshot).search(queries, 5, exclude)
        for query, rows, scores in zip(queries, hits.rows, hits.scores):
            np.testing.assert_allclose(scores, kept[rows] @ query, atol=1e-5)
    assert all(gate.passed for gate in run_gates(snapshot, None))


def test_chosen_recipes_halve_what_is_kept_in_halves(unit) -> None:
    assert str(build(unit(60, 4), codes="float16").recipe) == "SQfp16"
    assert str(build(unit(60, 4), codes="int8").recipe) == "Flat"
    with pytest.raises(BuildError, match="SQfp16"):
        Recipe.parse("IVF8,SQ8")


def test_vectors_of_another_type_than_the_manifest_states_are_torn(unit, store) -> None:
    vectors = unit(30, 4)
    with SnapshotWriter(store, fingerprint="one", as_of=1_700_000_000) as writer:
        built = build(vectors, k=5)
        writer.vectors(vectors, "float16")
        writer._codes = "int8"
        writer.ids([f"i{row}" for row in range(30)])
        writer.index(built.index, recipe="Flat")
    with pytest.raises(SnapshotTorn, match=r"float16\[30, 4\], expected int8"):
        Snapshot.open(writer.path)
