"""Histories whose entries do not see each other: the same as plain Hugging Face under a dense mask of that shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ranking.prefill.engine import Engine
from ranking.prefill.errors import BadHistory
from ranking.prefill.history import stages, whole_entries
from ranking.prefill.plan import plan
from ranking.prefill.request import Limits, Request

LABELS = (5, 9)
EDGES = (12, 20, 21, 40, 52)


def asked(toy: Any, prefix: int = 60, edges: tuple[int, ...] = EDGES, seed: int = 0) -> Request:
    plain = toy.request(prefix, [3, 5, 3], seed)
    return Request(plain.prefix, plain.items, history=edges)


def masked(model: PreTrainedModel, request: Request) -> np.ndarray:
    """One forward per item under a dense mask that hides the entries from each other."""
    rows = []
    for item in request.items:
        ids = torch.tensor([[*request.prefix, *item]])
        seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        for first, last in zip(request.history, request.history[1:]):
            seen[first:last, request.history[0] : first] = False
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
        with torch.inference_mode():
            rows.append(model(ids, attention_mask=bias).logits[0, -1, list(LABELS)])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("how", [{"backend": "cpu_flash"}, {"backend": "reference"}, {"deterministic": True}])
@pytest.mark.parametrize(("prefix", "edges"), [(60, EDGES), (52, EDGES), (60, (1, 60)), (60, (12, 13, 14, 15))])
def test_entries_see_the_beginning_and_themselves(how: dict[str, Any], prefix: int, edges: tuple[int, ...], toy: Any) -> None:
    model, request = toy.model(), asked(toy, prefix, edges)
    found = Engine(model, LABELS, **how).score([request])[0]
    np.testing.assert_allclose(found, masked(model, request), atol=1e-5, rtol=1e-5)
    if len(edges) > 2:
        assert np.abs(found - toy.alone(model, request)).max() > 1e-3, "full attention is another function"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_history_that_grows_goes_on_from_its_whole_entries(deterministic: bool, toy: Any) -> None:
    model = toy.model()
    engine = Engine(model, LABELS, deterministic=deterministic, limits=Limits(max_tokens=64))
    before = asked(toy)
    words = before.prefix
    grown = Request([*words[:52], *range(30), *words[52:]], before.items, history=(*EDGES, 70, 82))
    reused = []
    for request in (before, grown, grown):
        known = engine.stats.tokens_reused
        found = engine.score([request])[0]
        reused.append(engine.stats.tokens_reused - known)
        np.testing.assert_allclose(found, masked(model, request), atol=1e-5, rtol=1e-5)
        cold = Engine(model, LABELS, deterministic=deterministic, cache_bytes=0).score([request])[0]
        if deterministic:
            np.testing.assert_array_equal(found, cold)
    assert reused == ([0, 0, 90] if deterministic else [0, 52, 90])


def test_the_same_tokens_with_other_bounds_are_another_prefix(toy: Any) -> None:
    model, engine = toy.model(), Engine(toy.model(), LABELS)
    for edges in (EDGES, (12, 30, 52), ()):
        request = asked(toy, edges=edges)
        want = masked(model, request) if edges else toy.alone(model, request)
        np.testing.assert_allclose(engine.score([request])[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edges", [(5,), (0, 5), (5, 5), (9, 5), (5, 61)])
def test_bounds_outside_the_prefix_are_refused(edges: tuple[int, ...], toy: Any) -> None:
    with pytest.raises(BadHistory):
        plan([asked(toy, edges=edges)], apart=True)


def test_a_loop_that_cannot_keep_entries_apart_says_so(toy: Any) -> None:
    with pytest.raises(BadHistory, match="lean loop"):
        plan([asked(toy)])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_stages_cover_what_is_left_and_never_cut_an_entry(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 80))
    edges = tuple(sorted(data.draw(st.sets(st.integers(1, length), max_size=8))))
    edges = edges if len(edges) > 1 else ()
    done = whole_entries(data.draw(st.integers(0, length)), length, edges, data.draw(st.booleans()))
    found = list(stages(done, length, edges, data.draw(st.integers(1, 30))))
    assert [stage.start for stage in found] == [done, *(stage.stop for stage in found)][: len(found)]
    assert (found[-1].stop if found else done) == length
    for stage in found:
        if stage.entries is not None:
            bounds = (stage.entries.bounds + stage.start).tolist()
            assert set(bounds) <= set(edges) and bounds[-1] == stage.stop and stage.entries.seen == edges[0]
        elif edges:
            assert stage.stop <= edges[0] or stage.start >= edges[-1]
