"""The contenders agree with one item per pass, sweep fairly and keep to their seconds; counts agree with torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking.prefill.bench import Wishes, body_of, fresh_requests, model_of, twins
from ranking.prefill.contenders import MaskTooLarge, Plain, Reader, UnfairContender
from ranking.prefill.engine import Engine
from ranking.prefill.entrants import Course, best_batch, course, entrants_of
from ranking.prefill.load import ready
from ranking.prefill.operations import (
    Body,
    PrefillShape,
    attention_operations,
    linear_operations,
    lower_bound,
    one_by_one,
    packed_dense,
    prefix_cached,
    warm_lower_bound,
)
from ranking.prefill.plan import Request
from ranking.prefill.products import Products
from retrieval.llama import Size

SIZE = Size(hidden=32, layers=2, heads=4, kv_heads=2, mlp=48, vocabulary=64)
SHAPE = PrefillShape(16, 8, 4)
LABELS = (2, 3)
ONE_BILLION = Body(layers=16, hidden=2048, mlp=8192, heads=32, kv_heads=8, dims=64)


def drawn(shape: PrefillShape = SHAPE) -> tuple[np.ndarray, Sequence[np.ndarray]]:
    return next(fresh_requests(np.random.default_rng(1), 64, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("shape", [SHAPE, PrefillShape(16, 7, 4, "mixed")])
def test_every_contender_agrees_with_one_item_per_pass(dtype: torch.dtype, batch: int, shape: PrefillShape) -> None:
    """Weights 10 times larger than at birth: an item that lost its prefix or its place would be seen."""
    model = model_of(SIZE, Wishes())
    for weight in model.parameters():
        weight.data = weight.data * 10 if weight.ndim > 1 else weight.data
    models = twins(model, dtype, {torch.float32})
    prefix, items = drawn(shape)
    exact = Plain(models[torch.float32], LABELS).one_by_one(prefix)(items, 1)
    with torch.inference_mode():
        rows = [[*prefix, *item] for item in items]
        slow = np.stack([models[torch.float32](torch.tensor([row])).logits[0, -1, list(LABELS)].numpy() for row in rows])
    np.testing.assert_allclose(exact, slow, atol=1e-4)
    assert exact.std(0).min() > 0.1
    plain = Plain(models[dtype], LABELS)
    bound = 1e-4 if dtype == torch.float32 else 0.05 * np.abs(exact).max()
    mask = plain.dense_mask(shape.prefix, [len(one) for one in items])
    for begin in plain.ways().values():
        read = begin(prefix)
        for _ in range(2):  # the second time shows that the prefix's keys were left alone
            np.testing.assert_allclose(read(items, batch), exact, atol=bound)
    np.testing.assert_allclose(plain.packed_dense(prefix, items, mask), exact, atol=bound)


def test_a_dense_mask_shows_each_item_its_prefix_and_itself() -> None:
    mask = Plain(model_of(SIZE, Wishes()), LABELS).dense_mask(2, (1, 3))
    seen = (mask == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 1, 1, 1],
    ]


def test_a_dense_mask_has_a_limit() -> None:
    with pytest.raises(MaskTooLarge, match="17024 x 17024"):
        Plain(model_of(SIZE, Wishes()), LABELS).dense_mask(1024, [32] * 500)


def test_contenders_run_under_sdpa() -> None:
    model = model_of(SIZE, Wishes())
    model.set_attn_implementation("eager")
    with pytest.raises(UnfairContender, match="eager"):
        Plain(model, LABELS)


def slow_unless(batch: int, tried: list[int]) -> Reader:
    """Reads one batch size at once and the others slowly."""

    def read(items: Sequence[np.ndarray], size: int) -> np.ndarray:
        tried.append(size)
        sum(range(1 if size == batch else 20_000 * len(items)))
        return np.zeros((len(items), 2), np.float32)

    return read


def test_the_best_batch_is_the_quickest_one() -> None:
    """Sizes above 64 are tried only while the largest is the best; a size that would not be done in time is not begun."""
    items = [np.zeros(1, np.int64)] * 300
    for best, most, largest in ((4, 256, 64), (64, 256, 128), (8, 16, 16)):
        tried: list[int] = []
        found, pace, top = best_batch(slow_unless(best, tried), items, 4, most)
        assert (found, top, max(tried)) == (best, largest, largest) and pace > 0
    tried = []
    assert best_batch(slow_unless(64, tried), items, 8, 256, seconds=1e-9)[0] == 1 == max(tried)


def test_a_course_keeps_to_its_seconds() -> None:
    assert course(math.inf, 9.0, 5, 3) == Course(5, True, math.inf)
    assert course(100, 1.0, 5, 3) == Course(5, True, pytest.approx(55 / 3))
    assert course(100, 10.0, 5, 3) == Course(2, False, pytest.approx(50 / 3))
    assert course(-1, 10.0, 5, 3) == Course(1, False, 0.0)


def test_an_entrant_is_timed_on_what_fits_or_left_out_with_the_reason() -> None:
    plain, (prefix, items) = Plain(model_of(SIZE, Wishes()), LABELS), drawn()
    whole = list(entrants_of(plain, prefix, items, Course(3, True, math.inf)))
    assert [(one.items, one.rounds, one.reason) for one in whole] == [(8, 3, "")] * 3
    assert all(one.seconds(prefix, items) > 0 for one in whole)
    for each, reason in ((0.0, "not tried"), (1e-6, "foretold")):
        out = list(entrants_of(plain, prefix, items, Course(3, True, each)))
        assert all(one.rounds == 0 == one.items and reason in one.reason for one in out)


@pytest.mark.parametrize("warm", [False, True])
def test_operations_by_hand(warm: bool) -> None:
    """hidden 4, MLP 5, 2 heads over 1 key head of 2 dims, 2 layers; P=3, N=2, L=2: 7 rows, 4 of them without the prefix.

    k, v: 2*4*2 = 16 weights; q, o: 2*4*4 = 32; MLP 3*4*5 = 60; a pair costs 4*2*2 = 16.
    """
    body, shape = Body(2, 4, 5, 2, 1, 2), PrefillShape(3, 2, 2)
    rows, prefix_pairs = (4, 0) if warm else (7, 6)
    assert linear_operations(body, shape, warm=warm) == 2 * (2 * rows * 16 + rows * 92 + 2 * 92)
    assert attention_operations(body, shape, warm=warm) == 16 * (prefix_pairs + (12 + 6) + 2 * 5)
    bound = warm_lower_bound if warm else lower_bound
    assert bound(body, shape) == linear_operations(body, shape, warm=warm) + attention_operations(body, shape, warm=warm)
    assert one_by_one(body, shape) == 2 * 2 * (2 * 5 * 108 + 16 * 15)
    assert prefix_cached(body, shape) == 2 * (2 * 7 * 108 + 16 * (6 + 12 + 6))
    assert packed_dense(body, shape) == 2 * (2 * 7 * 108 + 16 * 7 * 7)
    uneven = PrefillShape(3, 2, 2, "mixed")  # 1 and 3 tokens: 1 + 6 pairs of their own instead of 3 + 3
    assert attention_operations(body, uneven, warm=warm) == attention_operations(body, shape, warm=warm) + 16
    assert prefix_cached(body, uneven) == prefix_cached(body, shape) + 2 * 16
    assert one_by_one(body, uneven) == 2 * (2 * 10 * 108 + 16 * (10 + 21))


def test_operations_of_a_billion_weights() -> None:
    """Known counts of the 1B shape at P=1024, N=500, L=32: 35.4e12, at least 33.3e12, warm 31.4e12; one by one is 30.1 times."""
    shape = PrefillShape(1024, 500, 32)
    counts = [count(ONE_BILLION, shape) / 1e12 for count in (prefix_cached, lower_bound, warm_lower_bound)]
    assert [round(count, 1) for count in counts] == [35.4, 33.3, 31.4]
    assert round(one_by_one(ONE_BILLION, shape) / prefix_cached(ONE_BILLION, shape), 1) == 30.1


def kernel_operations(body: Body, shape: PrefillShape, warm: bool) -> int:
    """What the kernel is asked for: prefix rows see their prefix, item rows the prefix and their item, whole (the kernel
    itself skips what comes after a row); in the last layer one row of each item asks."""
    prefix, seen = 0 if warm else shape.prefix**2, shape.prefix + shape.length
    return body.pair * ((body.layers - 1) * (prefix + shape.item_rows * seen) + shape.items * seen)


def asked_of_the_kernel(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shape", [PrefillShape(16, 8, 4), PrefillShape(300, 5, 3), PrefillShape(7, 3, 1)])
@pytest.mark.parametrize("warm", [False, True])
def test_the_engine_multiplies_no_more_than_its_formula(layers: int, shape: PrefillShape, warm: bool) -> None:
    """Counted by torch under the engine: the linear layers' lower bound exactly, attention, and the label rows."""
    size = Size(hidden=32, layers=layers, heads=4, kv_heads=2, mlp=48, vocabulary=64)
    model = ready(model_of(size, Wishes()))
    engine, body = Engine(model, LABELS), body_of(model)
    assert engine.backend == "cpu_flash"
    prefix, items = drawn(shape)
    if warm:
        engine.prefill(prefix.tolist())
    kernel = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: asked_of_the_kernel}
    with FlopCounterMode(display=False, custom_mapping=kernel) as counter:
        engine.score([Request(prefix.tolist(), [one.tolist() for one in items])])
    labels = 2 * shape.items * size.hidden * len(LABELS)
    linear = linear_operations(body, shape, warm=warm)
    assert counter.get_total_flops() == linear + kernel_operations(body, shape, warm) + labels


def test_bare_products_are_those_of_the_linear_layers() -> None:
    """Odd prefix and length, where the mean number of keys is whole: both counts are exact."""
    model, shape = ready(model_of(SIZE, Wishes())), PrefillShape(17, 6, 3)
    products, body = Products(Engine(model, LABELS), body_of(model), shape), body_of(model)
    with FlopCounterMode(display=False) as linear:
        products.linear()
    with FlopCounterMode(display=False) as attention:
        products.attention()
    assert linear.get_total_flops() == linear_operations(body, shape)
    assert attention.get_total_flops() == attention_operations(body, shape)
