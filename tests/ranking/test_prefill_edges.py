"""Corners of the prefill engine that a hostile reader found: each was wrong once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ranking.prefill.engine import Engine
from ranking.prefill.errors import BadLimits, EmptyPrefix, LabelError, PrefixTooLong, UnknownToken, UnknownVector
from ranking.prefill.load import ready
from ranking.prefill.plan import plan
from ranking.prefill.request import Limits, Request
from ranking.prefill.weights import UnsupportedModel
from retrieval.llama import add_lora

LABELS = (5, 9)
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


def close(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_allclose(left, right, atol=1e-5, rtol=1e-5)


def test_padding_does_not_move_the_angles(toy: Any) -> None:
    model, asked = toy.model(rope_parameters=DYNAMIC, max_position_embeddings=64), toy.request(40, [3, 20])
    close(Engine(model, LABELS, deterministic=True).score([asked])[0], toy.alone(model, asked))


def test_a_prefix_alone_is_checked_like_one_with_items(toy: Any) -> None:
    engine = Engine(toy.model(rope_parameters=DYNAMIC, max_position_embeddings=64), LABELS)
    with pytest.raises(PrefixTooLong):
        engine.prefill([1] * 65)
    with pytest.raises(EmptyPrefix):
        engine.prefill([])
    with pytest.raises(UnknownToken):
        engine.prefill([60])


def test_limits_of_a_caller_never_go_beyond_the_model(toy: Any) -> None:
    engine = Engine(toy.model(max_position_embeddings=64), LABELS, limits=Limits(max_tokens=64))
    with pytest.raises(PrefixTooLong):
        engine.score([toy.request(62, [3])])


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_item": -1}, {"max_positions": 0}, {"too_long": "drop"}])
def test_limits_that_no_plan_can_keep_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadLimits):
        Limits(**wrong)


@pytest.mark.parametrize("length", [50, 120])
def test_prefixes_that_begin_alike_do_not_shadow_each_other(toy: Any, length: int) -> None:
    engine = Engine(toy.model(), LABELS)
    common = toy.request(length - 20, []).prefix
    both = [[*common, *toy.request(20, [], seed).prefix] for seed in (1, 2)]
    first = [engine.prefill(prefix) for prefix in both]
    assert (first[0] == length and first[1] < length) or length == 50
    assert [engine.prefill(prefix) for prefix in both * 2] == [0, 0, 0, 0]
    assert len(engine.cache._entries) == 2


def test_a_grown_prefix_takes_the_place_of_the_one_it_covers(toy: Any) -> None:
    engine = Engine(toy.model(), LABELS)
    prefix = toy.request(150, []).prefix
    engine.prefill(prefix[:100])
    assert engine.prefill(prefix) == 50 and len(engine.cache._entries) == 1
    assert engine.prefill(prefix[:100]) == 0


def test_a_prefix_larger_than_the_cache_leaves_the_others_alone(toy: Any) -> None:
    engine = Engine(toy.model(), LABELS, cache_bytes=3 * 2 * 200 * 2 * 8 * 4)
    small = toy.request(100, [], 1).prefix
    engine.prefill(small)
    assert engine.prefill(toy.request(250, [], 2).prefix) == 250
    assert engine.prefill(small) == 0


def test_an_engine_follows_its_model(toy: Any) -> None:
    model, other = toy.model(), toy.model(initializer_range=0.5)
    engine, asked = Engine(model, LABELS), toy.request(70, [3, 4])
    engine.score([asked])
    model.load_state_dict(other.state_dict(), assign=True)
    close(engine.score([asked])[0], toy.alone(other, asked))
    ready(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
    close(engine.score([asked])[0], toy.alone(model, asked))
    add_lora(model, 2)
    close(engine.score([asked])[0], toy.alone(model, asked))
    assert engine.loop == "modules"
    with pytest.raises(UnsupportedModel, match="LoRA"):
        ready(model)


@pytest.mark.parametrize(
    "vectors",
    [np.full((1, 32), np.nan, np.float32), np.full((1, 32), np.inf, np.float32), np.zeros(32, np.float32)],
)
def test_vectors_that_are_no_finite_rows_are_refused(toy: Any, vectors: np.ndarray) -> None:
    with pytest.raises(UnknownVector):
        Engine(toy.model(), LABELS).score([Request([1, 2], [[-1, 3], [7, 3, 4]], vectors)])


def test_odd_ids_and_widths_are_errors_of_their_own(toy: Any) -> None:
    engine = Engine(toy.model(), np.array(LABELS))  # type: ignore[arg-type]
    with pytest.raises(UnknownVector, match="one width"):
        engine.score([Request([1], [[-1]], np.zeros((1, wide), np.float32)) for wide in (31, 32)])
    with pytest.raises(UnknownToken):
        engine.score([Request([1], [[2**63]])])
    with pytest.raises(LabelError):
        Engine(toy.model(), np.array([], np.int64))  # type: ignore[arg-type]


def test_a_pass_holds_a_bounded_number_of_prefixes() -> None:
    asked = [Request(list(range(100)), [[seed]]) for seed in range(60)]
    chunks = plan(asked, Limits(max_tokens=100), apart=True).chunks
    assert max(len(chunk.pieces) for chunk in chunks) <= 4
    assert sorted(np.concatenate([chunk.unique for chunk in chunks]).tolist()) == list(range(60))


@pytest.mark.parametrize("max_tokens", [30, 100])
def test_deterministic_scores_do_not_depend_on_odd_budgets_and_warm_beginnings(toy: Any, max_tokens: int) -> None:
    model, asked = toy.model(), toy.request(200, [5, 9, 5])
    want = Engine(model, LABELS, deterministic=True).score([asked])[0]
    engine = Engine(model, LABELS, deterministic=True, limits=Limits(max_tokens=max_tokens))
    engine.prefill(asked.prefix[:130])
    np.testing.assert_array_equal(engine.score([asked])[0], want)
    assert np.array_equal(engine.score([replace(asked, items=asked.items[1:])])[0], want[1:])
