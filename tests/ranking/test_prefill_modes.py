"""What the engine promises beyond one pass: the model family, the prefix cache, bitwise scores, items of vectors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranking.prefill.attend import BackendMissing
from ranking.prefill.cache import BLOCK
from ranking.prefill.engine import Engine
from ranking.prefill.errors import PrefixTooLong, UnknownVector
from ranking.prefill.load import load_engine, probabilities, ready
from ranking.prefill.request import Limits, Request

LABELS = (5, 9)
KINDS = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("backend", ["cpu_flash", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_member_of_the_family_scores_as_alone(kind: str, backend: str, toy: Any) -> None:
    model, asked = toy.model(kind), toy.request(70, [3, 1, 9, 3, 5])
    np.testing.assert_allclose(Engine(model, LABELS, backend=backend).score([asked])[0], toy.alone(model, asked), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_weights_are_the_modules_own(kind: str, tmp_path: Path, toy: Any) -> None:
    model, asked = toy.model(kind), toy.request(20, [4, 2, 4])
    before, want = toy.alone(model, asked), Engine(model, LABELS).score([asked])[0]
    held = {weight.data_ptr() for weight in model.parameters()}
    engine = Engine(ready(model), LABELS)
    assert len(engine._lean.weights.blocks[0].qk) == 1 and len(engine._lean.weights.blocks[0].gate_up) == 1
    np.testing.assert_allclose(engine.score([asked])[0], want, atol=1e-6)
    np.testing.assert_array_equal(toy.alone(model, asked), before)
    assert len({weight.data_ptr() for weight in model.parameters()}) == len(held)
    model.save_pretrained(tmp_path)
    loaded = load_engine(tmp_path, LABELS, arithmetic="float32")
    found = probabilities(loaded, asked.prefix, asked.items)
    np.testing.assert_allclose(found, torch.softmax(torch.from_numpy(before), -1).numpy(), atol=1e-5)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_scalings_by_length_are_exact_up_to_the_original_length_and_refused_beyond(rope: str, toy: Any) -> None:
    parameters = {"rope_type": rope, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    if rope == "longrope":
        parameters |= {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4}
    model = toy.model(rope_parameters=parameters, max_position_embeddings=64 if rope == "dynamic" else 256)
    engine, asked = Engine(model, LABELS), toy.request(40, [3, 20])
    np.testing.assert_allclose(engine.score([asked])[0], toy.alone(model, asked), atol=1e-5)
    with pytest.raises(PrefixTooLong, match="64 positions"):
        engine.score([toy.request(40, [3, 25])])


@pytest.mark.parametrize("backend", ["cpu_flash", "reference"])
def test_a_grown_history_reuses_what_came_before(backend: str, toy: Any) -> None:
    model = toy.model()
    engine = Engine(model, LABELS, backend=backend)
    first = toy.request(300, [4, 4, 7])
    grown = Request([*first.prefix, *range(30)], first.items)
    shorter = Request(first.prefix[: 2 * BLOCK + 9], first.items)
    assert engine.prefill(first.prefix) == 300
    for asked, computed in ((first, 0), (grown, 30), (grown, 0), (shorter, 0)):
        before = engine.stats.tokens_computed
        np.testing.assert_allclose(engine.score([asked])[0], toy.alone(model, asked), atol=1e-5)
        assert engine.stats.tokens_computed - before == computed
    assert (engine.stats.hits, engine.stats.partial, engine.stats.misses) == (3, 1, 1)


def test_the_cache_stays_within_its_budget_and_drops_the_least_recently_used(toy: Any) -> None:
    model = toy.model()
    one = 3 * 2 * 100 * 2 * 8 * 4  # layers, k and v, tokens, key heads, dims, float32
    engine = Engine(model, LABELS, cache_bytes=2 * one)
    a, b, c = (toy.request(100, [3, 3], seed) for seed in (1, 2, 3))
    engine.score([a])
    engine.score([b])
    engine.score([a])
    engine.score([c])
    assert engine.stats.bytes == 2 * one and engine.stats.evicted_bytes == one
    assert engine.prefill(a.prefix) == 0 and engine.prefill(b.prefix) > 0
    none = Engine(model, LABELS, cache_bytes=0)
    np.testing.assert_allclose(none.score([a])[0], toy.alone(model, a), atol=1e-5)
    assert none.stats.bytes == 0
    with pytest.raises(BackendMissing, match="keeps no prefixes"):
        none.prefill(a.prefix)


def test_a_prefix_in_use_is_never_evicted(toy: Any) -> None:
    one = 3 * 2 * 50 * 2 * 8 * 4
    engine = Engine(toy.model(), LABELS, cache_bytes=one)
    used, other = np.arange(50), np.arange(50)[::-1].copy()
    _, entry, _ = engine._keys(used)
    assert engine.prefill(other.tolist()) == 50
    assert engine.stats.bytes == one and engine.stats.evicted_bytes == one
    assert engine.prefill(used.tolist()) == 0
    engine.cache.release(entry)
    assert engine.prefill(other.tolist()) == 50 and engine.prefill(used.tolist()) == 50


def test_threads_share_an_engine(toy: Any) -> None:
    model = toy.model()
    engine = Engine(model, LABELS)
    asked = [toy.request(90, [3, 5, 5], seed) for seed in range(6)]
    found: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        engine.prefill(asked[number].prefix)
        found[number] = engine.score([asked[number]])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(asked):
        np.testing.assert_allclose(found[number], toy.alone(model, one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_deterministic_score_is_the_same_bit_for_bit_in_any_company(kind: str, toy: Any) -> None:
    model = toy.model(kind)
    engine = Engine(model, LABELS, deterministic=True)
    asked = toy.request(150, [6, 3, 6, 11, 3, 6, 3, 2])
    base = engine.score([asked])[0]
    np.testing.assert_allclose(base, toy.alone(model, asked), atol=1e-5)
    one_each = [engine.score([Request(asked.prefix, [item])])[0][0] for item in asked.items]
    np.testing.assert_array_equal(np.array(one_each), base)
    order = np.random.default_rng(0).permutation(8)
    shuffled = engine.score([Request(asked.prefix, [asked.items[row] for row in order])])[0]
    np.testing.assert_array_equal(shuffled, base[order])
    many = Request(asked.prefix, [*asked.items, *toy.request(1, [6, 3, 11] * 60, 5).items])
    np.testing.assert_array_equal(engine.score([toy.request(40, [2, 6], 3), many])[1][:8], base)
    small = Engine(model, LABELS, deterministic=True, limits=Limits(max_tokens=64))
    np.testing.assert_array_equal(small.score([asked])[0], base)
    cold = Engine(model, LABELS, deterministic=True, cache_bytes=0)
    np.testing.assert_array_equal(cold.score([asked])[0], base)
    grown = Request([*asked.prefix, *range(20)], asked.items)
    np.testing.assert_array_equal(engine.score([grown])[0], cold.score([grown])[0])


def test_deterministic_scores_need_the_backend_that_gives_them(toy: Any) -> None:
    with pytest.raises(BackendMissing, match="cpu_steady"):
        Engine(toy.model(), LABELS, deterministic=True, backend="cpu_flash")


@pytest.mark.parametrize("backend", ["cpu_flash", "reference"])
def test_an_item_of_vectors_scores_as_the_same_embeddings(backend: str, toy: Any) -> None:
    model = toy.model()
    table = model.get_input_embeddings().weight.detach()
    words = toy.request(33, [4, 6, 4], 2)
    given = [17, 23, 41]
    spelled = Request(words.prefix, [[17, 3, 4], [23, 41, 3, 4], *words.items, [17, 3, 4]])
    mixed = Request(words.prefix, [[-1, 3, 4], [-2, -3, 3, 4], *words.items, [-1, 3, 4]], table[given].numpy())
    engine = Engine(model, LABELS, backend=backend)
    np.testing.assert_allclose(engine.score([mixed])[0], engine.score([spelled])[0], atol=1e-6)
    both = engine.score([mixed, spelled, mixed])
    np.testing.assert_allclose(both[2], both[1], atol=1e-6)


def test_vectors_that_are_not_there_or_do_not_fit_are_refused(toy: Any) -> None:
    engine, vectors = Engine(toy.model(), LABELS), np.zeros((2, 32), np.float32)
    for wrong in (
        Request([1, -1], [[2]], vectors),
        Request([1], [[-3, 2]], vectors),
        Request([1], [[-1]]),
        Request([1], [[-1]], np.zeros((2, 31), np.float32)),
    ):
        with pytest.raises(UnknownVector):
            engine.score([wrong])
