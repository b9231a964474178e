"""How fast one prefill scores N items, beside the plain Hugging Face ways at their best, in one process and in turn.

Seconds of one machine say little about another, so every figure is a ratio: against a contender of the same minute, against the
bare matrix products of the same linear layers, and against the operations that nobody can avoid (`ranking.prefill.operations`).
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from index.errors import BrewlineError
from ranking.prefill import operations
from ranking.prefill.contenders import WAYS, Ids, Items, MaskTooLarge, Plain
from ranking.prefill.engine import Engine
from ranking.prefill.entrants import Course, Entrant, course, entrants_of, timed
from ranking.prefill.figures import Facts, Times, name_of, row, shares, speed, speedups
from ranking.prefill.load import fastest, ready
from ranking.prefill.machine import allocator, growth
from ranking.prefill.operations import Body, PrefillShape
from ranking.prefill.plan import Request
from ranking.prefill.products import Products
from ranking.prefill.weights import check_family, head_dims
from retrieval.llama import Size, load_llama, new_llama

Report = Callable[[int, int], None]
Requests = Iterator[tuple[Ids, Items]]

LABELS = (2, 3)
PARITY_ITEMS, HURRIED_PARITY_ITEMS = 20, 4
"""Items whose logits are compared with one full prompt each, without and with a budget of seconds."""
OURS = 4
"""Our part of a turn (cold, warm, two kinds of bare products) in cold requests, at most."""
PIECE = 8
"""The part of a packed request that warms the dense way up is one of so many."""
UNBOUNDED = 1 << 40
"""Cache budget that never evicts: the warm rows are about a prefix that is there."""


class BenchError(BrewlineError):
    """The shape to measure does not exist or cannot hold the items."""


@dataclass(frozen=True)
class Wishes:
    """`dtype` of the contenders' weights, `arithmetic` of the engine's copy, rounds, seed of the tokens, budget of seconds."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    arithmetic: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    repeats: int = 5
    seed: int = 0
    seconds: float = math.inf


def model_of(source: Size | Path, wishes: Wishes) -> PreTrainedModel:
    """The checkpoint of a folder in the wished dtype, or a LLaMA of a shape with random weights.

    Raises CheckpointError and BenchError.
    """
    if isinstance(source, Path):
        return load_llama(source, causal_lm=True, dtype=getattr(torch, wishes.dtype))
    size = source
    if size.hidden % (2 * size.heads) or size.heads % size.kv_heads:
        raise BenchError(
            f"hidden {size.hidden} must be a multiple of twice the heads ({size.heads}), and the heads one of the "
            f"key heads ({size.kv_heads})"
        )
    torch.manual_seed(wishes.seed)
    return new_llama(size, size.vocabulary, causal_lm=True)


def body_of(model: PreTrainedModel) -> Body:
    """The shape of a model's layers. Raises UnsupportedModel."""
    check_family(model)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Body(config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads, kv_heads, head_dims(model))


def bench_prefill(model: PreTrainedModel, shape: PrefillShape, wishes: Wishes, report: Report | None = None) -> Facts:
    """Every figure of one shape; `report` is called with (done, total) turns. The model's weights may be rounded and moved.

    `seconds_p99` of fewer than 100 repetitions is close to `seconds_max`. The warm figures are those of items that do not all
    begin alike: where they do, the engine moves the common beginning behind the prefix, and a request with another beginning
    would compute that part anew; no row here pays for it. `packed_dense` is timed once, after one warm-up on an eighth of the
    items. With a budget of `wishes.seconds`, a contender is timed on part of its items or left out with its `reason`.

    Raises BenchError, UnsupportedModel, UnfairContender and the errors of `Engine`.
    """
    ends, busy_before, body = time.perf_counter() + wishes.seconds, os.getloadavg()[0], body_of(model)
    theirs: torch.dtype = getattr(torch, wishes.dtype)
    small = wishes.arithmetic == "int8"
    wanted = "float32" if small else wishes.arithmetic
    chosen: torch.dtype = fastest("cpu") if wanted == "auto" else getattr(torch, wanted)
    models = twins(model, theirs, {chosen, torch.float32})
    ours = ready(copy.deepcopy(models[chosen]), int8=True) if small else ready(models[chosen])
    engine = Engine(ours, LABELS, cache_bytes=UNBOUNDED)
    requests = fresh_requests(np.random.default_rng(wishes.seed), model.config.vocab_size, shape)
    first: list[float] = []
    peak = growth(lambda: first.extend(_cold(engine, *next(requests)) for _ in range(2)))  # before any contender has left memory
    plain, dtypes = {dtype: Plain(twin, LABELS) for dtype, twin in models.items()}, list(dict.fromkeys((theirs, chosen)))
    way = course(ends - time.perf_counter(), OURS * first[-1], wishes.repeats, len(WAYS) * len(dtypes))
    entrants = [one for dtype in dtypes for one in entrants_of(plain[dtype], *next(requests), way)]
    times = _rounds(engine, entrants, Products(engine, body, shape), requests, way, report)
    some = min(shape.items, PARITY_ITEMS if math.isinf(wishes.seconds) else HURRIED_PARITY_ITEMS)
    apart = _differences(engine, plain[torch.float32], [plain[theirs], *entrants], requests, some)
    rate = operations.lower_bound(body, shape) / statistics.median(times.cold)
    foretold = 2 * operations.packed_dense(body, shape) / rate
    rows = [row(one, times, shape, difference) for one, difference in zip(entrants, apart[3:])]
    rows.append(_dense(plain[theirs], plain[torch.float32], shape, requests, some, (foretold, ends - time.perf_counter())))
    return {
        **speed(times, shape),
        **speedups(rows, statistics.median(times.cold), {"": name_of(theirs), "_same_arithmetic": engine.arithmetic}),
        **shares(times, body, shape),
        "max_abs_logit": apart[0],
        "max_abs_diff": apart[1],
        "max_abs_diff_hugging_face": apart[2],
        "parity_items": some,
        "peak_bytes": peak,
        **_circumstances(engine, busy_before),
        "repetitions": len(times.cold),
        "budget_seconds": wishes.seconds,
        "one_by_one_items_timed": entrants[0].items,
        "contenders": rows,
    }


def twins(model: PreTrainedModel, dtype: torch.dtype, others: set[torch.dtype]) -> dict[torch.dtype, PreTrainedModel]:
    """The model with its weights rounded to `dtype`, and copies of those same weights in the other dtypes.

    Weights alone change: rotary frequencies stay float32, as in a checkpoint that is loaded in that dtype.
    """
    found = {dtype: _rounded(model, dtype)}
    for other in others - {dtype}:
        found[other] = _rounded(copy.deepcopy(model), other)
    return found


def fresh_requests(rng: np.random.Generator, vocabulary: int, shape: PrefillShape) -> Requests:
    """Yields a new prefix int64 [P] and N distinct items int64 [l], lengths shuffled, that do not all begin alike.

    Raises BenchError at once if there are not enough.
    """
    lengths, counts = np.unique(shape.item_lengths, return_counts=True)
    if (lengths * np.log2(vocabulary) < np.log2(2 * counts)).any():
        raise BenchError(f"{shape.items} distinct items of {shape.length} tokens need a vocabulary larger than {vocabulary}")

    def draw() -> Requests:
        while True:
            sizes = rng.permutation(shape.item_lengths)
            items: dict[tuple[int, ...], Ids] = {}
            for size in sizes.tolist():
                while (one := tuple(rng.integers(0, vocabulary, size).tolist())) in items:
                    pass
                items[one] = np.array(one, np.int64)
            if shape.items == 1 or len({one[0] for one in items}) > 1:
                yield rng.integers(0, vocabulary, shape.prefix), list(items.values())

    return draw()


def _rounds(
    engine: Engine, entrants: Sequence[Entrant], products: Products, requests: Requests, way: Course, report: Report | None
) -> Times:
    """Ours before each of the others (or once in a round), everything on tokens that nobody has seen."""
    times = Times(plain={one.key: [] for one in entrants})
    products.linear()
    products.attention()
    order = [[one for one in entrants if number < one.rounds] for number in range(way.repeats)]
    turns = [(one, way.every_turn or not place) for turn in order for place, one in enumerate(turn or [None])]
    for done, (one, ours) in enumerate(turns):
        if report:
            report(done, len(turns))
        prefix, items = next(requests)
        if ours:
            times.cold.append(_cold(engine, prefix, items))
            times.warm.append(_warm(engine, prefix, next(requests)[1]))
            times.linear.append(timed(products.linear))
            times.attention.append(timed(products.attention))
        if one:
            times.plain[one.key].append(one.seconds(prefix, items))
    if report:
        report(len(turns), len(turns))
    return times


def _differences(
    engine: Engine, exact: Plain, others: Sequence[Plain | Entrant], requests: Requests, count: int
) -> list[float | None]:
    """How far zero, the engine's logits and those of `others` lie from one item per pass of the float32 model, on `count` items.

    None for an entrant that was left out.
    """
    prefix, items = next(requests)
    some = items[:count]
    want = exact.one_by_one(prefix)(some, 1)
    found: list[float | None] = [float(np.abs(want).max())]
    found.append(float(np.abs(engine.score([_request(prefix, items)])[0][:count] - want).max()))
    for other in others:
        if isinstance(other, Entrant):
            logits = other.begin(prefix)(some, other.batch) if other.rounds else None
        else:
            logits = want if other is exact else other.one_by_one(prefix)(some, 1)
        found.append(None if logits is None else float(np.abs(logits - want).max()))
    return found


def _dense(
    plain: Plain, exact: Plain, shape: PrefillShape, requests: Requests, count: int, seconds: tuple[float, float]
) -> Facts:
    """One packed pass, timed once: its T x T scores take longer than everything else. `seconds`: foretold, and left."""
    prefix, items = next(requests)
    told: Facts = {"name": "packed_dense", "dtype": name_of(plain.dtype), "seconds": None, "items_per_second": None}
    if seconds[0] > seconds[1]:
        return {**told, "reason": f"foretold {seconds[0]:.1f} s, {max(0.0, seconds[1]):.1f} s of the budget are left"}
    try:
        mask = plain.dense_mask(shape.prefix, [len(one) for one in items])
    except MaskTooLarge as error:
        return {**told, "reason": str(error)}
    piece = items[: max(1, len(items) // PIECE)]
    rows = shape.prefix + sum(len(one) for one in piece)
    plain.packed_dense(prefix, piece, mask[:rows, :rows])
    began = time.perf_counter()
    found = plain.packed_dense(prefix, items, mask)[:count]
    spent = time.perf_counter() - began
    apart = float(np.abs(found - exact.one_by_one(prefix)(items[:count], 1)).max())
    return {**told, "seconds": spent, "items_per_second": shape.items / spent, "max_abs_diff": apart, "reason": ""}


def _circumstances(engine: Engine, busy_before: float) -> Facts:
    return {
        "weights_bytes": sum(weight.numel() * weight.element_size() for weight in engine.model.parameters()),
        "backend": engine.backend,
        "arithmetic": engine.arithmetic,
        "allocator": allocator(),
        "threads": torch.get_num_threads(),
        "load_average": [busy_before, os.getloadavg()[0]],
    }


def _cold(engine: Engine, prefix: Ids, items: Items) -> float:
    engine.cache.clear()
    return timed(engine.score, [_request(prefix, items)])


def _warm(engine: Engine, prefix: Ids, items: Items) -> float:
    before = engine.stats.tokens_reused
    seconds = timed(engine.score, [_request(prefix, items)])
    if engine.stats.tokens_reused - before < len(prefix):
        raise BenchError("the prefix that was just scored is not in the cache: the warm figure would be a cold one")
    return seconds


def _request(prefix: Ids, items: Items) -> Request:
    return Request(prefix.tolist(), [one.tolist() for one in items])


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model
