"""The catalogue says of each row what the night read, is of one day with the vectors, and refuses what does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index.build import build
from index.snapshot import Snapshot
from index.writer import SnapshotWriter
from retrieval.catalog import (
    CATALOG_PART,
    TOKENS_PART,
    Catalog,
    CatalogError,
    UnknownItem,
    write_catalog,
    write_tokens,
)
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, Items
from retrieval.fingerprint import FingerprintMismatch
from retrieval.parts import part_bytes

AS_OF = 19_740 * DAY
HOSTILE = "<|item|>\x00\u202e\n<|answer|> 🦆 " + "x" * 20_000


def hostile(items: Items) -> Items:
    return replace(items, title=[HOSTILE, "", *items.title[2:]], item_id=["é🦆\n", *items.item_id[1:]])


def snapshot_of(store: Path, items: Items, parts: dict[str, bytes]) -> Snapshot:
    vectors = np.random.default_rng(0).normal(size=(len(items), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    built = build(vectors)
    with SnapshotWriter(store, fingerprint="f" * 20, as_of=AS_OF) as writer:
        writer.vectors(vectors)
        writer.ids(items.item_id)
        writer.index(built.index, recipe=str(built.recipe), facts=built.facts)
        for name, content in parts.items():
            writer.part(name, content)
    return Snapshot.open(writer.path)


def bare(items: Items, facts: bytes | None) -> bytes:
    """An Arrow file of ids alone, with these words about itself."""
    batch = pa.record_batch({"item_id": pa.array(items.item_id, pa.large_string())})
    batch = batch.replace_schema_metadata({} if facts is None else {b"brewline": facts})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


@pytest.fixture(scope="module")
def items(tiny_dataset: Dataset) -> Items:
    return hostile(tiny_dataset.items)


@pytest.fixture(scope="module")
def numbers(tiny_dataset: Dataset) -> dict[str, np.ndarray]:
    found = Counts.from_dataset(tiny_dataset).as_of(AS_OF)
    found["positive_rate"][7] = np.nan
    return found


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, items: Items, numbers: dict[str, np.ndarray]) -> Catalog:
    parts = {
        CATALOG_PART: write_catalog(items, numbers, [f"d{row}" for row in range(len(items))], AS_OF),
        TOKENS_PART: write_tokens([list(range(row % 5)) for row in range(len(items))], "a" * 20),
    }
    return Catalog.open(snapshot_of(tmp_path_factory.mktemp("store"), items, parts))


def test_every_row_is_the_item_that_was_written(catalog: Catalog, items: Items) -> None:
    assert len(catalog) == len(items)
    for row in range(len(items)):
        assert catalog.item(row) == items[row]
        assert catalog.title(row) == items.title[row]
    assert catalog.digest(3) == "d3"
    assert catalog.as_of == AS_OF


def test_numbers_are_those_of_the_night_and_nan_where_unknown(catalog: Catalog, numbers: dict[str, np.ndarray]) -> None:
    assert any(np.isnan(column).any() for column in numbers.values())
    for row in (0, 7, 59):
        found = catalog.numbers(row)
        assert list(found) == list(numbers)
        np.testing.assert_array_equal(list(found.values()), [column[row] for column in numbers.values()])


def test_ids_lead_to_rows_and_back(catalog: Catalog, items: Items) -> None:
    order = np.random.default_rng(1).permutation(len(items))
    wanted = [items.item_id[row] for row in order]
    np.testing.assert_array_equal(catalog.rows(wanted), order)
    assert catalog.ids(order) == wanted
    np.testing.assert_array_equal(catalog.rows(["i3", "nobody", "i3"]), [3, -1, 3])
    assert catalog.words("creator", [5, 4]) == [items.creator[5], items.creator[4]]
    with pytest.raises(UnknownItem, match="nobody"):
        catalog.row("nobody")


def test_tokens_are_the_rankers_and_no_other_is_accepted(catalog: Catalog) -> None:
    assert [row.tolist() for row in catalog.tokens([4, 0, 6])] == [[0, 1, 2, 3], [], [0]]
    catalog.require_ranker("a" * 20)
    with pytest.raises(FingerprintMismatch) as caught:
        catalog.require_ranker("b" * 20)
    assert "a" * 20 in str(caught.value) and "b" * 20 in str(caught.value)


def test_without_a_ranker_there_are_no_tokens(tmp_path: Path, items: Items) -> None:
    found = Catalog.open(snapshot_of(tmp_path, items, {CATALOG_PART: write_catalog(items, {}, [""] * len(items), AS_OF)}))
    with pytest.raises(CatalogError, match="--ranker"):
        found.tokens([0])
    with pytest.raises(FingerprintMismatch, match="without a ranker"):
        found.require_ranker("a" * 20)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, items: Items) -> None:
    with pytest.raises(CatalogError, match=r"no part catalog\.arrow"):
        Catalog.open(snapshot_of(tmp_path / "none", items, {}))
    good = write_catalog(items, {}, [""] * len(items), AS_OF)
    for name, content, words in (
        ("torn", good[: len(good) // 2], "cannot be read"),
        ("empty", b"", "cannot be read"),
        ("stranger", bare(items, None), "says it is nothing"),
        ("no words", bare(items, b'["catalog.arrow", 1]'), "says it is nothing"),
        ("columns", bare(items, b'{"part": "catalog.arrow", "format": 1, "as_of": 1}'), "no column title, text, category"),
        ("foreign", write_tokens([[1]] * len(items), "r"), r"says it is tokens\.arrow"),
    ):
        with pytest.raises(CatalogError, match=words):
            Catalog.open(snapshot_of(tmp_path / name, items, {CATALOG_PART: content}))
    with pytest.raises(CatalogError, match=r"60 vectors but tokens\.arrow holds 1 rows"):
        Catalog.open(snapshot_of(tmp_path / "short", items, {CATALOG_PART: good, TOKENS_PART: write_tokens([[1]], "r")}))


def test_a_facet_that_is_no_text_is_refused(tmp_path: Path, items: Items) -> None:
    batch = pa.ipc.open_file(write_catalog(items, {}, [""] * len(items), AS_OF)).get_batch(0)
    for name, kind in (("text", pa.large_string()), ("number", pa.int64())):
        told = batch.append_column("region", pa.array(range(len(items))).cast(kind))
        snapshot = snapshot_of(tmp_path / name, items, {CATALOG_PART: part_bytes(told, CATALOG_PART, {"as_of": AS_OF})})
        if name == "text":
            assert Catalog.open(snapshot).item(7).facets == {"region": "7"}
        else:
            with pytest.raises(CatalogError, match=r"catalog\.arrow has no column region of the right type"):
                Catalog.open(snapshot)


def test_uneven_columns_and_double_ids_are_not_written(items: Items) -> None:
    with pytest.raises(CatalogError, match="one length"):
        write_catalog(items, {}, ["d"], AS_OF)
    double = replace(items, item_id=["same", "same", *items.item_id[2:]])
    with pytest.raises(CatalogError, match="more than once"):
        write_catalog(double, {}, [""] * len(items), AS_OF)


def test_equal_input_gives_equal_bytes(items: Items, numbers: dict[str, np.ndarray]) -> None:
    digests = ["d"] * len(items)
    assert write_catalog(items, numbers, digests, AS_OF) == write_catalog(items, numbers, digests, AS_OF)


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, retrieval.catalog, retrieval.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
