"""Which changed numbers are worth a new vector: steps add up, unknown is far from known, and nothing else passes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.publish import current
from index.snapshot import Snapshot
from retrieval.catalog import Catalog
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset
from retrieval.embed import rows_of
from retrieval.encoder import Encoder
from retrieval.features import Quantizer
from retrieval.hysteresis import EMBEDDED_PART, EXACT, Hysteresis, embedded_numbers
from retrieval.llama import Size
from retrieval.moments import end_of
from retrieval.packed_bench import made_encoder
from retrieval.pooled_rate import POOLED, PooledRates
from retrieval.refresh import NightReport, SnapshotForm, nightly
from retrieval.tonight import Tonight

LOOSE = Hysteresis(8)


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


@pytest.fixture(scope="module")
def first_night(tiny_dataset: Dataset) -> int:
    """Numbers change much over the days that follow; every item exists on the last of them."""
    return tiny_dataset.meta.cut_valid - 2 * DAY


def run(dataset: Dataset, encoder: Encoder, store: Path, moment: int, policy: Hysteresis = EXACT) -> tuple[NightReport, Snapshot]:
    report = nightly(dataset, encoder, None, store, moment, form=SnapshotForm(hysteresis=policy))
    path = current(store)
    assert path is not None and path.name == report.snapshot
    return report, Snapshot.open(path)


def encoded(dataset: Dataset, encoder: Encoder, snapshot: Snapshot) -> np.ndarray:
    """What the encoder makes of a snapshot's items and of the numbers that the snapshot says it read."""
    catalog = Catalog.open(snapshot)
    items = [dataset.items[dataset.items.row_of[one]] for one in catalog.ids(range(len(catalog)))]
    return encoder.items(items, embedded_numbers(snapshot, catalog))


@pytest.mark.parametrize("kind", ["percentile", "log", "percentile_text", "raw"])
def test_a_number_may_stray_so_many_buckets_and_no_more(kind: str) -> None:
    quantizer = Quantizer.fit({"n": np.arange(1, 1001.0)}, kind)  # type: ignore[arg-type]
    then = np.full(5, 200.0)
    step = 1.3 if kind == "log" else 1.06
    now = np.array([200.0, 200.0 * step, 200.0 / step, 900.0, np.nan])
    away = np.abs(quantizer.bucket("n", now) - quantizer.bucket("n", then))
    assert 0 < away[1] < 4 and 0 < away[2] < 4 < away[3]
    assert EXACT.moved(quantizer, "n", then, now).tolist() == [False, True, True, True, True]
    assert Hysteresis(4).moved(quantizer, "n", then, now).tolist() == [False, False, False, True, True]
    assert Hysteresis(100).moved(quantizer, "n", now, then).tolist() == [False, False, False, False, True]
    assert not EXACT.moved(quantizer, "n", np.array([np.nan]), np.array([np.nan])).any()


def test_digits_count_by_value_and_buckets_by_bucket() -> None:
    columns = {"n": np.arange(1000.0)}
    then, now = np.array([200.0]), np.array([200.5])
    assert EXACT.moved(Quantizer.fit(columns, "raw"), "n", then, now).all()
    assert not EXACT.moved(Quantizer.fit(columns), "n", then, now).any()


def test_under_a_policy_vectors_are_of_the_numbers_that_the_snapshot_says(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, first_night: int
) -> None:
    shares: dict[int, list[int]] = {0: [], 8: []}
    for policy in (EXACT, LOOSE):
        for day in range(5):
            moment = first_night + day * DAY
            report, snapshot = run(tiny_dataset, encoder, tmp_path / str(policy.buckets), moment, policy)
            shares[policy.buckets].append(report.embedded)
            assert report.hysteresis == policy.buckets
            np.testing.assert_allclose(snapshot.vectors, encoded(tiny_dataset, encoder, snapshot), atol=1e-6)
            catalog = Catalog.open(snapshot)
            rows = [tiny_dataset.items.row_of[one] for one in catalog.ids(range(len(catalog)))]
            exact = Counts.from_dataset(tiny_dataset, before=moment).as_of(moment)
            exact[POOLED] = PooledRates.from_dataset(tiny_dataset, before=moment).as_of(moment)
            for name, column in catalog.columns.numbers.items():
                np.testing.assert_array_equal(column, exact[name][rows], "the catalogue holds the numbers of the night")
            read = embedded_numbers(snapshot, catalog)
            assert not policy.any_moved(encoder.writer.quantizer, read, dict(catalog.columns.numbers), len(rows)).any()
    assert sum(shares[8][1:]) < sum(shares[0][1:]) and shares[8][0] == shares[0][0]


def test_small_steps_add_up(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, first_night: int) -> None:
    """Nobody does anything and ages grow by a day a night: no step of a single night counts, several together do."""
    quiet = replace(tiny_dataset, events=tiny_dataset.events.take(np.zeros(0, np.int64)))
    moments, quantizer = [first_night + day * DAY for day in range(6)], encoder.writer.quantizer
    ages = [quantizer.bucket("age_days", Counts.from_dataset(quiet).as_of(moment)["age_days"]) for moment in moments]
    policy = Hysteresis(max(int(np.abs(after - before)[before > 0].max()) for before, after in pairwise(ages)))
    assert 0 < policy.buckets < 50
    nights = [run(quiet, encoder, tmp_path, moment, policy)[0] for moment in moments]
    newcomers = [after.items - before.items for before, after in pairwise(nights)]
    assert nights[1].embedded == newcomers[0], "one step is too small"
    assert sum(night.embedded for night in nights[1:]) > sum(newcomers)


def test_the_policy_is_a_fact_of_the_snapshot_and_may_change(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, first_night: int
) -> None:
    exact = run(tiny_dataset, encoder, tmp_path / "store", first_night)[1]
    assert facts(exact) == "" and EMBEDDED_PART not in exact.parts
    loose_report, loose = run(tiny_dataset, encoder, tmp_path / "store", first_night + DAY, LOOSE)
    assert facts(loose) == "8" and EMBEDDED_PART in loose.parts and 0 < loose_report.embedded < loose_report.items
    again = run(tiny_dataset, encoder, tmp_path / "store", first_night + DAY, LOOSE)[0]
    assert (again.snapshot, again.embedded, again.published) == (loose.name, 0, False)
    back = run(tiny_dataset, encoder, tmp_path / "store", first_night + DAY + 3600)[1]
    fresh = run(tiny_dataset, encoder, tmp_path / "fresh", first_night + DAY + 3600)[1]
    np.testing.assert_allclose(back.vectors, fresh.vectors, atol=1e-6)
    exact_then = run(tiny_dataset, encoder, tmp_path / "exact", first_night + DAY)[1]
    assert np.abs(loose.vectors - exact_then.vectors).max() > 1e-4, "what the policy left alone was not encoded anew"


def facts(snapshot: Snapshot) -> str:
    return snapshot.manifest.extra.get("hysteresis", "")


def test_words_and_given_numbers_are_never_let_pass(tmp_path: Path, tiny_dataset: Dataset, first_night: int) -> None:
    """Each change is of an item of its own, so that no other change can have brought it along."""
    made_encoder(tiny_dataset, Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48), "mean", 0, tmp_path / "encoder")
    encoder, store, moment = Encoder.load(tmp_path / "encoder"), tmp_path / "store", first_night + 6 * DAY
    assert "price" in encoder.writer.quantizer.names
    run(tiny_dataset, encoder, store, moment, LOOSE)
    items = tiny_dataset.items
    price = items.numbers["price"].copy()
    price[np.nanargmax(price)] = 0
    for changed in (
        replace(items, title=other(items.title, 1)),
        replace(items, text=other(items.text, 2)),
        replace(items, category=other(items.category, 3)),
        replace(items, creator=other(items.creator, 4)),
        replace(items, item_id=other(items.item_id, 5)),
        replace(items, numbers={"price": price}),
    ):
        for dataset in (replace(tiny_dataset, items=changed), tiny_dataset):
            moment += 60
            report, snapshot = run(dataset, encoder, store, moment, LOOSE)
            assert report.embedded == 1
            np.testing.assert_allclose(snapshot.vectors, encoded(dataset, encoder, snapshot), atol=1e-6)


def other(column: list[str], row: int) -> list[str]:
    return [*column[:row], "something else", *column[row + 1 :]]


def test_words_beyond_the_budget_cost_nothing(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, first_night: int) -> None:
    text = [f"{one} {'and more of it ' * 40}" for one in tiny_dataset.items.text]
    long = replace(tiny_dataset, items=replace(tiny_dataset.items, text=text))
    run(long, encoder, tmp_path, first_night + 60)
    longer = replace(long, items=replace(long.items, text=[f"{one} the end" for one in text]))
    assert run(longer, encoder, tmp_path, first_night + 120)[0].embedded == 0


@pytest.mark.parametrize("policy", [EXACT, LOOSE])
def test_a_number_that_prompts_do_not_show_is_no_reason_to_read_items_anew(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, policy: Hysteresis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first night after an upgrade, whose predecessor does not hold the number."""
    moment, of = end_of(tiny_dataset), Tonight.of

    def without(*given: Any) -> Tonight:
        tonight = of(*given)
        del tonight.numbers[POOLED]
        return tonight

    with monkeypatch.context() as older:
        older.setattr(Tonight, "of", without)
        before, held = run(tiny_dataset, encoder, tmp_path, moment, policy)
    assert before.embedded == before.items and POOLED not in Catalog.open(held).as_of_names
    after, held = run(tiny_dataset, encoder, tmp_path, moment + 3600, policy)
    assert after.embedded == 0 and POOLED in Catalog.open(held).as_of_names
    assert POOLED in embedded_numbers(held, Catalog.open(held))


def test_rows_of_yesterday_are_found_in_any_order(tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder) -> None:
    _, snapshot = run(tiny_dataset, encoder, tmp_path, end_of(tiny_dataset))
    catalog = Catalog.open(snapshot)
    ids = catalog.ids(range(len(catalog)))
    for asked in (ids, [*ids, "new"], ids[:-3], ids[:5] + ids[6:], ids[::-1], ["new", *ids], ["new"], []):
        np.testing.assert_array_equal(rows_of(catalog, asked), catalog.rows(asked))
    assert rows_of(catalog, ids).tolist() == list(range(len(ids)))
