"""The plan is arithmetic on token lists: what is packed, where, and who may look at whom."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranking.prefill.errors import EmptyItem, EmptyPrefix, ItemTooLong, PrefixTooLong
from ranking.prefill.plan import Chunk, Plan, common_prefix, plan
from ranking.prefill.request import Limits, Request


def unpack(planned: Plan) -> dict[int, tuple[list[int], list[int]]]:
    """Unique item -> (all tokens it may see, in order; their positions), rebuilt from the packed passes alone."""
    prefixes: dict[int, list[int]] = {}
    seen: dict[int, tuple[list[int], list[int]]] = {}
    for chunk in planned.chunks:
        row = item = 0
        for piece in chunk.pieces:
            if piece.prefix:
                prefixes[piece.request] = chunk.tokens[row : row + piece.prefix_tokens].tolist()
                assert chunk.positions[row : row + piece.prefix_tokens].tolist() == list(range(piece.prefix_tokens))
                row += piece.prefix_tokens
            prefix = prefixes[piece.request]
            for number in range(item, item + piece.items):
                first, last = chunk.item_bounds[number], chunk.item_bounds[number + 1]
                assert chunk.last[number] == last - 1
                tokens = prefix + chunk.tokens[first:last].tolist()
                positions = list(range(len(prefix))) + chunk.positions[first:last].tolist()
                seen[int(chunk.unique[number])] = (tokens, positions)
            item += piece.items
            if not piece.keep:
                del prefixes[piece.request]
        assert row == chunk.prefix_rows and item == len(chunk.last)
    assert not prefixes
    return seen


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(tokens, st.lists(tokens, max_size=7)), max_size=4),
    st.integers(1, 30),
    st.booleans(),
)
def test_every_item_continues_its_own_prefix_whatever_the_packing(
    raw: list[tuple[list[int], list[list[int]]]], budget: int, hoist: bool
) -> None:
    requests = [Request(prefix, items) for prefix, items in raw]
    planned = plan(requests, Limits(max_tokens=budget), hoist=hoist)
    seen = unpack(planned)
    assert sorted(seen) == list(range(planned.unique_items))
    for request, rows in zip(requests, planned.fan_out):
        for item, unique in zip(request.items, rows.tolist()):
            together = [*request.prefix, *item]
            assert seen[unique] == (together, list(range(len(together))))
    for chunk in planned.chunks:
        assert len(chunk.tokens) <= budget or len(chunk.last) == 1


def test_the_prefix_is_computed_once_however_many_passes_the_items_need() -> None:
    items = [[10 + n, 1] for n in range(100)]
    planned = plan([Request([1, 2, 3], items)], Limits(max_tokens=20))
    assert len(planned.chunks) > 5
    assert planned.tokens == 3 + 200
    assert [chunk.pieces[0].prefix for chunk in planned.chunks] == [True] + [False] * (len(planned.chunks) - 1)
    assert [chunk.pieces[0].keep for chunk in planned.chunks] == [True] * (len(planned.chunks) - 1) + [False]


def test_equal_items_are_computed_once() -> None:
    planned = plan([Request([1], [[2, 3], [4], [2, 3], [4], [4]])])
    assert planned.unique_items == 2
    rows = planned.fan_out[0].tolist()
    assert rows[0] == rows[2] and rows[1] == rows[3] == rows[4] and rows[0] != rows[1]


def test_what_all_items_begin_with_moves_into_the_prefix() -> None:
    planned = plan([Request([1], [[7, 8, 2], [7, 8, 3], [7, 8, 3, 4]])])
    chunk = planned.chunks[0]
    assert chunk.tokens[: chunk.prefix_rows].tolist() == [1, 7, 8]
    assert chunk.positions[chunk.prefix_rows :].tolist() == [3, 3, 3, 4]


@pytest.mark.parametrize(
    ("items", "shared"),
    [
        ([], 0),
        ([[1, 2, 3]], 2),
        ([[1], [1, 2]], 0),
        ([[1, 2], [1, 2, 3]], 1),
        ([[5, 1], [6, 1]], 0),
        ([[1, 2, 3], [1, 2, 4], [1, 9, 9]], 1),
    ],
)
def test_an_item_keeps_at_least_one_token(items: list[list[int]], shared: int) -> None:
    assert common_prefix(items) == shared


def test_items_of_equal_length_lie_together() -> None:
    planned = plan([Request([1], [[2, 3], [4], [5, 6], [7], [8, 9, 1]])])
    lengths = np.diff(planned.chunks[0].item_bounds)
    assert lengths.tolist() == sorted(lengths.tolist())


def test_requests_that_cannot_be_scored_are_refused_by_type() -> None:
    with pytest.raises(EmptyPrefix, match="request 1"):
        plan([Request([1], [[2]]), Request([], [[2]])])
    with pytest.raises(EmptyItem, match="item 1 of request 0"):
        plan([Request([1], [[2], []])])
    with pytest.raises(ItemTooLong, match="3 tokens, the limit is 2"):
        plan([Request([1], [[2, 3, 4]])], Limits(max_item=2))
    with pytest.raises(PrefixTooLong, match="4 positions"):
        plan([Request([1, 2, 3], [[2, 3]])], Limits(max_positions=4))


def test_a_too_long_item_is_cut_only_as_told() -> None:
    requests = [Request([1], [[2, 3, 4]])]
    end = plan(requests, Limits(max_item=2, too_long="keep_end"), hoist=False).chunks[0]
    start = plan(requests, Limits(max_item=2, too_long="keep_start"), hoist=False).chunks[0]
    assert end.tokens.tolist() == [1, 3, 4]
    assert start.tokens.tolist() == [1, 2, 3]


def test_a_request_without_items_gets_an_empty_answer() -> None:
    planned = plan([Request([1], []), Request([2], [[3]])])
    assert [len(rows) for rows in planned.fan_out] == [0, 1]
    assert plan([]).chunks == ()


def sight(chunk: Chunk) -> str:
    """A picture of one pass: row = asking token, column = token looked at."""
    request_of = np.empty(len(chunk.tokens), int)
    row = 0
    for number, piece in enumerate(chunk.pieces):
        request_of[row : row + piece.prefix_tokens] = number
        row += piece.prefix_tokens
    for number, piece in enumerate(chunk.pieces):
        request_of[piece.first_row : piece.last_row] = number
    segment = np.searchsorted(chunk.segments, np.arange(len(chunk.tokens)), "right")
    lines = []
    for asking in range(len(chunk.tokens)):
        line = ""
        for looked in range(len(chunk.tokens)):
            own = segment[asking] == segment[looked] and looked <= asking
            prefix = looked < chunk.prefix_rows <= asking and request_of[asking] == request_of[looked]
            line += "s" if own else "p" if prefix else "."
        lines.append(line)
    return "\n".join(lines)


def test_the_mask_drawn() -> None:
    requests = [Request([1, 2, 3], [[4, 5], [6, 7]]), Request([8, 9], [[4], [5, 6]])]
    chunk = plan(requests, hoist=False).chunks[0]
    assert (
        sight(chunk)
        == """
s...........
ss..........
sss.........
...s........
...ss.......
ppp..s......
ppp..ss.....
ppp....s....
ppp....ss...
...pp....s..
...pp.....s.
...pp.....ss
""".strip()
    )


def test_planning_needs_no_torch() -> None:
    code = "import sys, ranking.prefill.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
