"""Which questions are asked: checked by hand on a log of a dozen events, and against a slow twin on random logs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retrieval.data.schema import DAY, Dataset, Events, Items, Members, Meta
from retrieval.evidence.protocol import EvidenceError, cold_items, cold_members, last_after_cut, member_views
from retrieval.evidence.ragged import Ragged

VALID_CUT, TEST_CUT = 10 * DAY, 20 * DAY


def log_of(rows: list[tuple[int, int, int]], members: int, items: int) -> Dataset:
    """A data set of (time, member, item) views."""
    rows = sorted(rows, key=lambda row: row[0])
    time, member, item = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    size = len(rows)
    events = Events(
        event_id=np.arange(size),
        member=member.astype(np.int32),
        item=item.astype(np.int32),
        timestamp=time,
        action=np.zeros(size, np.int16),
        label=np.full(size, -1, np.int8),
        value=np.full(size, np.nan, np.float32),
        split=np.select([time < VALID_CUT, time < TEST_CUT], [0, 1], 2).astype(np.int8),
        request=np.full(size, -1, np.int32),
        position=np.full(size, -1, np.int16),
        surface=np.full(size, -1, np.int16),
        actions=("view",),
    )
    words = [f"thing {row}" for row in range(items)]
    empty = [""] * items
    catalogue = Items([f"i{row}" for row in range(items)], words, empty, empty, empty, np.full(items, np.iinfo(np.int64).min))
    people = Members([f"m{row}" for row in range(members)])
    return Dataset(Meta("log", VALID_CUT, TEST_CUT, ("view",)), catalogue, people, events)


def test_the_last_new_time_point_is_the_query_and_everything_strictly_earlier_the_history() -> None:
    late = TEST_CUT + 5 * DAY
    dataset = log_of(
        [
            (DAY, 0, 0),
            (TEST_CUT + DAY, 0, 1),  # after the cut, but not the last: history
            (late, 0, 2),  # a basket of two new items and a known one
            (late, 0, 3),
            (late, 0, 0),
            (late + 1, 0, 1),  # later, but nothing new
            (late, 1, 2),  # no history: left out
            (DAY, 2, 4),  # never comes back: no query
        ],
        members=3,
        items=6,
    )
    queries = last_after_cut(dataset)
    assert queries.member.tolist() == [0]
    assert queries.timestamp.tolist() == [late]
    assert sorted(queries.targets[0].tolist()) == [2, 3]
    assert queries.excluded[0].tolist() == [0, 1]
    assert queries.left_out == 1
    assert cold_items(queries, 6).tolist() == [False, True, True, True, False, True]
    view = member_views(dataset, queries)[0]
    assert [(entry.item.item_id, entry.timestamp) for entry in view.history] == [("i0", DAY), ("i1", TEST_CUT + DAY)]
    assert [entry.item.item_id for entry in member_views(dataset, queries, newest=1)[0].history] == ["i1"]


def test_the_validation_window_sees_no_event_after_the_test_cut() -> None:
    dataset = log_of([(DAY, 0, 0), (VALID_CUT + DAY, 0, 1), (TEST_CUT, 0, 2), (TEST_CUT + 1, 0, 3)], members=1, items=4)
    queries = last_after_cut(dataset, "valid")
    assert queries.cut == VALID_CUT
    assert queries.targets[0].tolist() == [1]
    assert queries.events.timestamp.max() < TEST_CUT


def test_members_first_seen_after_the_cut_are_cold() -> None:
    rows = [(TEST_CUT, 0, 0), (TEST_CUT + 1, 0, 1), (DAY, 1, 0), (TEST_CUT + 1, 1, 1)]
    assert cold_members(last_after_cut(log_of(rows, members=2, items=2))).tolist() == [True, False]


def test_a_window_without_a_question_is_an_error_that_says_why() -> None:
    one = log_of([(TEST_CUT, 0, 0)], members=1, items=1)
    said = "asks no question: 1 engagements, the last .* 1970-01-21 .* from the cut .1970-01-21 .* 1 members touch"
    with pytest.raises(EvidenceError, match=said):
        last_after_cut(one)
    with pytest.raises(EvidenceError, match="names 'like', the actions seen are 'view'"):
        last_after_cut(replace(one, meta=replace(one.meta, retrieval_actions=("like",))))
    with pytest.raises(EvidenceError, match="has no interactions"):
        last_after_cut(replace(one, events=one.events.take(np.zeros(1, bool))))


@pytest.mark.parametrize("seed", range(5))
def test_the_queries_equal_those_of_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [(int(rng.integers(0, 30)) * DAY, int(rng.integers(0, 12)), int(rng.integers(0, 9))) for _ in range(120)]
    queries = last_after_cut(log_of(rows, 12, 9))
    expected, left_out = slow_queries(rows)
    found = {
        int(member): (int(time), set(queries.targets[row].tolist()), set(queries.excluded[row].tolist()))
        for row, (member, time) in enumerate(zip(queries.member, queries.timestamp, strict=True))
    }
    assert found == expected
    assert queries.left_out == left_out


def slow_queries(rows: list[tuple[int, int, int]]) -> tuple[dict[int, tuple[int, set[int], set[int]]], int]:
    """The protocol in plain words, one member after the other."""
    found: dict[int, tuple[int, set[int], set[int]]] = {}
    left_out = 0
    for member in range(12):
        own = sorted((time, item) for time, who, item in rows if who == member)
        fresh = [(time, item) for time, item in own if all(other >= time for other, what in own if what == item)]
        moments = [time for time, _ in fresh if time >= TEST_CUT]
        if not moments:
            continue
        last = max(moments)
        history = {item for time, item in own if time < last}
        if history:
            found[member] = (last, {item for time, item in fresh if time == last}, history)
        else:
            left_out += 1
    return found, left_out


def test_ragged_take_distinct_and_age() -> None:
    lists = Ragged.from_pairs(np.array([2, 0, 2, 2]), np.array([7, 5, 9, 7]), 3)
    assert [lists[row].tolist() for row in range(3)] == [[5], [], [7, 9, 7]]
    assert lists.from_end.tolist() == [0, 2, 1, 0]
    assert [one.tolist() for one in map(lists.take(np.array([2, 1])).__getitem__, range(2))] == [[7, 9, 7], []]
    assert lists.distinct()[2].tolist() == [7, 9]
