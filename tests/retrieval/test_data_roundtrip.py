"""Property: a data set that a folder can hold comes back from the folder as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval.data.meta import split_by_cuts
from retrieval.data.read import read_dataset_report
from retrieval.data.schema import DAY, EVENT_COLUMNS, FACETS, MISSING_TIME, Connections, Dataset, Events, Items, Members, Meta
from retrieval.data.write import write_dataset

# Hostile on purpose: control characters, field tokens, right-to-left text; only lone surrogates have no UTF-8.
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.sampled_from(["<|title|>", "\x00", "a\nb"]))
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda text: bool(text.strip()))
NUMBER = st.one_of(st.just(float("nan")), st.floats(allow_infinity=False, allow_nan=False))
VALUE = st.one_of(st.just(float("nan")), st.floats(width=32, allow_infinity=False, allow_nan=False))
WHEN = st.one_of(st.just(MISSING_TIME), st.integers(-(10**9), 4 * 10**9))


def column(draw: st.DrawFn, values: st.SearchStrategy[object], size: int, kind: type) -> np.ndarray:
    return np.array(draw(st.lists(values, min_size=size, max_size=size)), kind)


def words(draw: st.DrawFn, size: int) -> list[str]:
    return draw(st.lists(TEXT, min_size=size, max_size=size))


def first_seen(codes: np.ndarray, names: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes numbered as a reader numbers them: by first occurrence."""
    used = list(dict.fromkeys(code for code in codes.tolist() if code >= 0))
    number = {code: place for place, code in enumerate(used)}
    return np.array([number.get(code, -1) for code in codes.tolist()], int), tuple(names[code] for code in used)


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    item_ids = draw(st.lists(IDS, min_size=1, max_size=4, unique=True))
    member_ids = draw(st.lists(IDS, min_size=1, max_size=4, unique=True))
    size, people = len(item_ids), len(member_ids)
    items = Items(
        item_ids, words(draw, size), words(draw, size), words(draw, size), words(draw, size),
        column(draw, WHEN, size, np.int64), {"price": column(draw, NUMBER, size, np.float64)},
        {name: draw(st.lists(TEXT, min_size=size, max_size=size)) for name in draw(st.sets(st.sampled_from(FACETS)))},
    )  # fmt: skip
    members = Members(member_ids, {"job": words(draw, people)}, {"age": column(draw, NUMBER, people, np.float64)})
    cuts = sorted(draw(st.tuples(st.integers(0, 40), st.integers(0, 40))))
    count = draw(st.integers(0, 6))
    meta = Meta(
        "named", cuts[0] * DAY, cuts[1] * DAY, ("like",), draw(TEXT), draw(TEXT), extra={"sizes": [1, None, {"a": "b"}]}
    )  # fmt: skip
    events = _events(draw, count, size, people, meta)
    edges = None
    if draw(st.booleans()):
        links = draw(st.integers(0, 3))
        kinds = draw(st.lists(IDS, min_size=links, max_size=links))
        rows = column(draw, st.integers(0, people - 1), links, np.int32)
        edges = Connections(rows, kinds, kinds[::-1], column(draw, WHEN, links, np.int64))
    return Dataset(meta, items, members, events, edges)


def _events(draw: st.DrawFn, count: int, size: int, people: int, meta: Meta) -> Events:
    names = draw(st.lists(IDS, min_size=2, max_size=2, unique=True))
    ids = np.array(sorted(draw(st.lists(st.integers(-5, 50), min_size=count, max_size=count, unique=True))), np.int64)
    times = np.sort(column(draw, st.integers(0, 3 * 10**6), count, np.int64))
    action, actions = first_seen(column(draw, st.integers(0, 1), count, int), ["like", "like:2"])
    request, requests = first_seen(column(draw, st.integers(-1, 1), count, int), names)
    surface, surfaces = first_seen(column(draw, st.integers(-1, 1), count, int), names)
    given_split = column(draw, st.integers(0, 2), count, np.int8)
    by_cuts = split_by_cuts(times, meta.cut_valid, meta.cut_test)
    return Events(
        ids, column(draw, st.integers(0, people - 1), count, np.int32), column(draw, st.integers(0, size - 1), count, np.int32),
        times, action.astype(np.int16), column(draw, st.integers(-1, 1), count, np.int8),
        column(draw, VALUE, count, np.float32),
        given_split if draw(st.booleans()) else by_cuts, request.astype(np.int32),
        column(draw, st.integers(-1, 32_767), count, np.int16), surface.astype(np.int16), actions, requests, surfaces,
    )  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(datasets())
def test_a_data_set_comes_back_as_it_was(dataset: Dataset) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "folder"
        write_dataset(dataset, folder)
        back, refusals = read_dataset_report(folder)
    assert not len(refusals), refusals[0]
    assert back.meta == dataset.meta
    for name in ("item_id", "title", "text", "category", "creator"):
        assert getattr(back.items, name) == getattr(dataset.items, name)
    assert back.items.facets == {name: found for name, found in dataset.items.facets.items() if any(found)}
    np.testing.assert_array_equal(back.items.created_at, dataset.items.created_at)
    np.testing.assert_array_equal(back.items.numbers["price"], dataset.items.numbers["price"])
    assert (back.members.member_id, back.members.profile) == (dataset.members.member_id, dataset.members.profile)
    np.testing.assert_array_equal(back.members.numbers["age"], dataset.members.numbers["age"])
    for name in EVENT_COLUMNS:
        np.testing.assert_array_equal(getattr(back.events, name), getattr(dataset.events, name), err_msg=name)
    assert (back.events.actions, back.events.requests) == (dataset.events.actions, dataset.events.requests)
    assert (back.connections is None) == (dataset.connections is None)
    if back.connections is not None and dataset.connections is not None:
        assert back.connections.other_id == dataset.connections.other_id
        np.testing.assert_array_equal(back.connections.since, dataset.connections.since)
