"""Pooled rates: against a slow loop over labels, nothing of the day itself, and what leaning on the kin means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.data.schema import DAY, Dataset
from retrieval.pooled_rate import CATEGORY_LABELS, HALF_LIFE, PRIOR_LABELS, Faded, PooledRates, categories_of


def slow_rate(dataset: Dataset, item: int, day: int) -> float:
    """The same number, one label at a time."""
    items, log = dataset.items, dataset.events

    day = min(day, int(log.day[log.label >= 0].max()) + 1)

    def left(kin: list[bool]) -> tuple[float, float]:
        positive = every = 0.0
        for row in np.flatnonzero((log.label >= 0) & (log.day < day)).tolist():
            if kin[log.item[row]]:
                weight = 2 ** (-(day - int(log.day[row])) / HALF_LIFE)
                positive, every = positive + weight * float(log.label[row]), every + weight
        return positive, every

    def shrunk(kin: list[bool], towards: float, worth: float) -> float:
        positive, every = left(kin)
        return (positive + worth * towards) / (every + worth)

    positive, every = left([True] * len(items))
    if not every:
        return np.nan
    own = sorted(set(categories_of(items.category[item])))
    words = [[word in categories_of(text) for text in items.category] for word in own]
    base = positive / every
    kind = float(np.mean([shrunk(kin, base, CATEGORY_LABELS) for kin in words])) if words else base
    made = [bool(name) and name == items.creator[item] for name in items.creator]
    return shrunk([row == item for row in range(len(items))], shrunk(made, kind, PRIOR_LABELS), PRIOR_LABELS)


def test_fast_rates_equal_a_slow_loop_over_labels(tiny_dataset: Dataset) -> None:
    category = [f"{word}, all|new, all" if row % 3 else "" for row, word in enumerate(tiny_dataset.items.category)]
    creator = [name if row % 4 else "" for row, name in enumerate(tiny_dataset.items.creator)]
    dataset = replace(tiny_dataset, items=replace(tiny_dataset.items, category=category, creator=creator))
    rates, days = PooledRates.from_dataset(dataset), np.unique(dataset.events.day)
    for day in (days[0], days[len(days) // 2], days[-1] + 400):
        fast = rates.as_of(int(day) * DAY + 4_000)
        for item in range(0, len(dataset.items), 23):
            np.testing.assert_allclose(fast[item], slow_rate(dataset, item, int(day)), err_msg=f"item {item} on day {day}")


def test_nothing_of_the_day_itself_or_later_changes_a_rate(tiny_dataset: Dataset) -> None:
    moment = tiny_dataset.meta.cut_valid + 5_000
    nothing_later = PooledRates.from_dataset(tiny_dataset, before=moment // DAY * DAY).as_of(moment)
    np.testing.assert_allclose(PooledRates.from_dataset(tiny_dataset).as_of(moment), nothing_later, rtol=1e-12)


def test_an_item_of_no_labels_is_expected_to_be_liked_as_its_creator_is() -> None:
    """Items 0 and 1 of one creator, 2 and 3 of another, 4 of nobody; 0 is always liked, 2 never."""
    item, none = np.repeat(np.array([0, 2]), 10), np.zeros(0, np.int64)
    creator, label = np.array([0, 0, 1, 1, -1]), (item == 0).astype(np.float64)
    found = PooledRates((item, np.full(20, 100), label), creator, (np.zeros(6, np.int64), none)).at(np.arange(5), np.full(5, 101))
    assert found[0] > found[1] > found[4] > found[3] > found[2] and found[4] == pytest.approx(0.5)


def test_a_log_that_has_ended_is_not_forgotten(tiny_dataset: Dataset) -> None:
    """`nightly --as-of now` over an old log, or one whose times are an order only, would take every item for an average one."""
    rates = PooledRates.from_dataset(tiny_dataset)
    after = int(tiny_dataset.events.timestamp.max()) + DAY
    np.testing.assert_array_equal(rates.as_of(after), rates.as_of(after + 100_000 * DAY))
    assert rates.as_of(after).std() > 0.01


def test_an_empty_log_knows_nothing() -> None:
    none = np.zeros(0, np.int64)
    rates = PooledRates((none, none, np.zeros(0)), np.full(3, -1), (np.zeros(4, np.int64), none))
    assert np.isnan(rates.as_of(10 * DAY)).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30_000), st.booleans()), max_size=60), st.integers(-5, 30_005))
def test_what_is_left_equals_a_sum_over_labels(labels: list[tuple[int, int, bool]], day: int) -> None:
    place, when, positive = (np.array(column, np.int64) for column in zip(*labels)) if labels else (np.zeros(0, np.int64),) * 3
    found = Faded.of(place, when, np.column_stack([positive, np.ones(len(positive))])).before(np.arange(-1, 5), np.full(6, day))
    for row, asked in enumerate(range(-1, 5)):
        met = (place == asked) & (when < day)
        weight = np.exp2(-(day - when[met]) / HALF_LIFE)
        np.testing.assert_allclose(found[row], [(weight * positive[met]).sum(), weight.sum()], rtol=1e-9, atol=1e-300)
