"""As-of numbers: against a slow loop, against hand numbers, and the same for all three users."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.counts import NUMBERS, PRIOR_WEIGHT, Counts
from retrieval.data.schema import DAY, MISSING_TIME, Dataset


def slow_counts(dataset: Dataset, item: int, day: int) -> dict[str, float]:
    """The same numbers, one event at a time."""
    events, found = dataset.events, dict.fromkeys(NUMBERS, 0.0)
    positive = labels = all_positive = all_labels = 0
    appeared = dataset.items.created_at[item] // DAY
    for row in range(len(events)):
        event_day, engaged = int(events.timestamp[row] // DAY), bool(dataset.is_engagement[row])
        if event_day >= day:
            continue
        if events.label[row] >= 0:
            all_labels += 1
            all_positive += int(events.label[row])
        if events.item[row] != item:
            continue
        if events.label[row] >= 0:
            labels += 1
            positive += int(events.label[row])
        if engaged:
            found["n_total"] += 1
            for name, window in (("n_30d", 30), ("n_7d", 7), ("n_1d", 1)):
                found[name] += event_day >= day - window
    prior = all_positive / all_labels if all_labels else 0.5
    found["positive_rate"] = (positive + PRIOR_WEIGHT * prior) / (labels + PRIOR_WEIGHT) if labels else np.nan
    found["age_days"] = day - appeared if day >= appeared else np.nan
    return found


def test_fast_counts_equal_a_slow_loop_over_events(tiny_dataset: Dataset) -> None:
    counts = Counts.from_dataset(tiny_dataset)
    days = np.unique(tiny_dataset.events.day)
    for day in (days[0], days[len(days) // 2], days[-1] + 1):
        fast = counts.as_of(int(day) * DAY + 4_000)
        for item in range(0, len(tiny_dataset.items), 7):
            slow = slow_counts(tiny_dataset, item, int(day))
            for name in NUMBERS:
                np.testing.assert_allclose(fast[name][item], slow[name], err_msg=f"{name} of item {item} on day {day}")


def test_nothing_of_the_day_itself_or_later_changes_a_count(tiny_dataset: Dataset) -> None:
    moment = tiny_dataset.meta.cut_valid + 5_000
    everything = Counts.from_dataset(tiny_dataset).as_of(moment)
    start_of_day = moment // DAY * DAY
    nothing_later = Counts.from_dataset(tiny_dataset, before=start_of_day).as_of(moment)
    for name in NUMBERS:
        np.testing.assert_array_equal(everything[name], nothing_later[name], err_msg=name)


def test_without_creation_times_the_first_event_of_a_day_does_not_show_on_that_day(tiny_dataset: Dataset) -> None:
    """An age of 0 taken from today's first event would tell the model that somebody chooses the item today."""
    items = replace(tiny_dataset.items, created_at=np.full(len(tiny_dataset.items), MISSING_TIME))
    dataset = replace(tiny_dataset, items=items)
    for day in np.unique(dataset.events.day).tolist():
        whole = Counts.from_dataset(dataset).as_of(day * DAY)
        known_then = Counts.from_dataset(dataset, before=day * DAY).as_of(day * DAY)
        for name in NUMBERS:
            np.testing.assert_array_equal(whole[name], known_then[name], err_msg=f"{name} on day {day}")


def test_training_and_night_read_the_same_numbers(tiny_dataset: Dataset) -> None:
    counts = Counts.from_dataset(tiny_dataset)
    day = tiny_dataset.meta.cut_valid // DAY
    night = counts.as_of(day * DAY + 86_399)
    item = np.array([3, 3, 17, 0])
    training = counts.at(item, np.full(4, day))
    for name in NUMBERS:
        np.testing.assert_array_equal(training[name], night[name][item], err_msg=name)


def test_an_empty_log_knows_nothing() -> None:
    none = np.zeros(0, np.int64)
    found = Counts(3, (none, none), (none, none, np.zeros(0)), np.full(3, np.nan)).as_of(10 * DAY)
    assert found["n_total"].tolist() == [0, 0, 0]
    assert np.isnan(found["positive_rate"]).all() and np.isnan(found["age_days"]).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=60), st.integers(-5, 60))
def test_windows_nest_and_total_never_falls(events: list[tuple[int, int]], day: int) -> None:
    item, when = (np.array(column, np.int64) for column in zip(*events))
    counts = Counts(4, (item, when), (item[:0], when[:0], np.zeros(0)), np.full(4, np.nan))
    today, tomorrow = counts.as_of(day * DAY), counts.as_of((day + 1) * DAY)
    for row in range(4):
        assert today["n_1d"][row] <= today["n_7d"][row] <= today["n_30d"][row] <= today["n_total"][row]
        assert today["n_total"][row] + ((item == row) & (when == day)).sum() == tomorrow["n_total"][row]
