"""How fast one prefill scores N items, beside the plain Hugging Face ways at their best, in one process and in turn.

Seconds of one machine say little about another, so every figure is a ratio: against a contender of the same minute, against the
bare matrix products of the same linear layers, and against the operations that nobody can avoid (`ranking.prefill.operations`).
"""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from index.errors import BrewlineError
from ranking.prefill.contenders import WAYS, Entrant, Ids, MaskTooLarge, Plain, Products, entrants_of, timed
from ranking.prefill.engine import Engine
from ranking.prefill.load import Arithmetic, fastest, ready
from ranking.prefill.operations import Body, PrefillShape, linear_operations, lower_bound, warm_lower_bound
from ranking.prefill.plan import Request
from ranking.prefill.weights import check_family, head_dims
from retrieval.llama import Size, load_llama, new_llama

Report = Callable[[int, int], None]
Facts = dict[str, object]
Requests = Iterator[tuple[Ids, Ids]]

LABELS = (2, 3)
PROC = Path("/proc/self")
PARITY_ITEMS = 20
UNBOUNDED = 1 << 40
"""Cache budget that never evicts: the warm rows are about a prefix that is there."""


class BenchError(BrewlineError):
    """The shape to measure does not exist or cannot hold the items."""


@dataclass(frozen=True)
class Wishes:
    """`dtype` of the contenders' weights, `arithmetic` of the engine's copy, rounds, and the seed of the tokens."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    arithmetic: Arithmetic = "auto"
    repeats: int = 5
    seed: int = 0


@dataclass
class Times:
    """Seconds of every repetition: the engine from nothing and with its prefix cached, bare products, and the plain ways."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    linear: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    plain: dict[tuple[str, torch.dtype], list[float]] = field(default_factory=dict)


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
    """Every figure of one shape; `report` is called with (done, total) rounds. The model's weights may be rounded and moved.

    Raises BenchError, UnsupportedModel, UnfairContender and the errors of `Engine`.
    """
    busy_before, body = os.getloadavg()[0], body_of(model)
    theirs: torch.dtype = getattr(torch, wishes.dtype)
    chosen: torch.dtype = fastest("cpu") if wishes.arithmetic == "auto" else getattr(torch, wishes.arithmetic)
    models = twins(model, theirs, {chosen, torch.float32})
    engine = Engine(ready(models[chosen]), LABELS, cache_bytes=UNBOUNDED)
    requests = fresh_requests(np.random.default_rng(wishes.seed), model.config.vocab_size, shape)
    peak = growth(lambda: [_cold(engine, *next(requests)) for _ in range(2)])  # before any contender has left memory behind
    plain = {dtype: Plain(twin, LABELS) for dtype, twin in models.items()}
    entrants = [one for dtype in dict.fromkeys((theirs, chosen)) for one in entrants_of(plain[dtype], *next(requests))]
    times = _rounds(engine, entrants, Products(engine, body, shape), requests, wishes.repeats, report)
    apart = _differences(engine, plain[torch.float32], [plain[theirs], *entrants], requests)
    return {
        **_speed(times, shape, theirs, chosen),
        **_shares(times, body, shape),
        "max_abs_logit": apart[0],
        "max_abs_diff": apart[1],
        "max_abs_diff_hugging_face": apart[2],
        "peak_bytes": peak,
        "weights_bytes": sum(weight.numel() * weight.element_size() for weight in models[chosen].parameters()),
        "backend": engine.backend,
        "arithmetic": _name(chosen),
        "allocator": allocator(),
        "threads": torch.get_num_threads(),
        "repetitions": len(times.cold),
        "load_average": [busy_before, os.getloadavg()[0]],
        "one_by_one_items_timed": entrants[0].items,
        "contenders": [
            *(_row(one, times, shape, difference) for one, difference in zip(entrants, apart[3:])),
            {"name": "packed_dense", "dtype": wishes.dtype, **_dense(plain[theirs], plain[torch.float32], shape, requests)},
        ],
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
    """Yields a new prefix int64 [P] and distinct items int64 [N, L] that do not all begin alike. Raises BenchError at once."""
    if shape.length * np.log2(vocabulary) < np.log2(2 * shape.items):
        raise BenchError(f"{shape.items} distinct items of {shape.length} tokens need a vocabulary larger than {vocabulary}")

    def draw() -> Requests:
        while True:
            items = np.empty((0, shape.length), np.int64)
            while len(items) < shape.items:
                more = rng.integers(0, vocabulary, (shape.items, shape.length))
                items = np.unique(np.concatenate([items, more]), axis=0)
            items = rng.permutation(items)[: shape.items]
            if shape.items == 1 or len(set(items[:, 0].tolist())) > 1:
                yield rng.integers(0, vocabulary, shape.prefix), items

    return draw()


def growth(work: Callable[[], object]) -> int | None:
    """Bytes by which the process was at its peak larger during `work` than before it; None where Linux's /proc is missing.

    The kernel's record of the peak is set back first; where it refuses, an earlier, higher peak makes the answer too large.
    """
    if not PROC.exists():
        work()
        return None
    held = int((PROC / "statm").read_text().split()[1]) * resource.getpagesize()
    with contextlib.suppress(OSError):  # a sandbox refuses: the record stays, the figure is an upper bound
        (PROC / "clear_refs").write_text("5")
    work()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held)


def allocator(process: Path = PROC) -> str:
    """The memory allocator that a process has loaded: "tcmalloc", "jemalloc", else "glibc" ("unknown" without /proc)."""
    if not process.exists():
        return "unknown"
    maps = (process / "maps").read_text()
    return next((name for name in ("tcmalloc", "jemalloc") if name in maps), "glibc")


def _rounds(
    engine: Engine, entrants: Sequence[Entrant], products: Products, requests: Requests, repeats: int, report: Report | None
) -> Times:
    """Ours before each of the others, everything on tokens that nobody has seen."""
    times = Times(plain={one.key: [] for one in entrants})
    products.linear()
    products.attention()
    order = [one for _ in range(repeats) for one in entrants]
    for done, one in enumerate(order):
        if report:
            report(done, len(order))
        prefix, items = next(requests)
        times.cold.append(_cold(engine, prefix, items))
        times.warm.append(_warm(engine, prefix, next(requests)[1]))
        times.plain[one.key].append(timed(one.score, prefix, items[: one.items]) * len(items) / one.items)
        times.linear.append(timed(products.linear))
        times.attention.append(timed(products.attention))
    if report:
        report(len(order), len(order))
    return times


def _differences(engine: Engine, exact: Plain, others: Sequence[Plain | Entrant], requests: Requests) -> list[float]:
    """How far zero, the engine's logits and those of `others` lie from one item per pass of the float32 model."""
    prefix, items = next(requests)
    some = items[:PARITY_ITEMS]
    want = exact.one_by_one(prefix, some, 1)
    found = [np.zeros_like(want), engine.score([_request(prefix, items)])[0][: len(some)]]
    for other in others:
        found.append(other.score(prefix, some) if isinstance(other, Entrant) else other.one_by_one(prefix, some, 1))
    return [float(np.abs(one - want).max()) for one in found]


def _dense(plain: Plain, exact: Plain, shape: PrefillShape, requests: Requests) -> Facts:
    """One packed pass, timed once: its T x T scores take longer than everything else."""
    prefix, items = next(requests)
    try:
        mask = plain.dense_mask(shape)
    except MaskTooLarge as error:
        return {"seconds": None, "reason": str(error)}
    began = time.perf_counter()
    found = plain.packed_dense(prefix, items, mask)[:PARITY_ITEMS]
    seconds = time.perf_counter() - began
    apart = np.abs(found - exact.one_by_one(prefix, items[:PARITY_ITEMS], 1)).max()
    return {"seconds": seconds, "max_abs_diff": float(apart), "reason": ""}


def _speed(times: Times, shape: PrefillShape, theirs: torch.dtype, ours: torch.dtype) -> Facts:
    seconds = statistics.median(times.cold)
    ratios = {key: statistics.median(many) / seconds for key, many in times.plain.items()}
    return {
        "seconds": seconds,
        "seconds_p99": float(np.quantile(times.cold, 0.99)),
        "seconds_warm": statistics.median(times.warm),
        "items_per_second": shape.items / seconds,
        **{f"speedup_{name}": ratios[name, theirs] for name in WAYS},
        **{f"speedup_{name}_same_arithmetic": ratios[name, ours] for name in WAYS},
    }


def _shares(times: Times, body: Body, shape: PrefillShape) -> Facts:
    seconds, warm, linear, attention = map(statistics.median, (times.cold, times.warm, times.linear, times.attention))
    rate = linear_operations(body, shape) / linear
    least = lower_bound(body, shape)
    ratio = warm_lower_bound(body, shape) / least
    return {
        "matmul_share": linear / seconds,
        "attention_matmul_share": (linear + attention) / seconds,
        "lower_bound_share": least / rate / seconds,
        "lower_bound_operations": least,
        "warm_operation_ratio": ratio,
        "warm_share": ratio / (warm / seconds),
    }


def _row(one: Entrant, times: Times, shape: PrefillShape, apart: float) -> Facts:
    seconds = statistics.median(times.plain[one.key])
    return {
        "name": one.name,
        "dtype": _name(one.dtype),
        "seconds": seconds,
        "items_per_second": shape.items / seconds,
        "batch": one.batch,
        "items_timed": one.items,
        "max_abs_diff": apart,
    }


def _cold(engine: Engine, prefix: Ids, items: Ids) -> float:
    engine.cache.clear()
    return timed(engine.score, [_request(prefix, items)])


def _warm(engine: Engine, prefix: Ids, items: Ids) -> float:
    before = engine.stats.tokens_reused
    seconds = timed(engine.score, [_request(prefix, items)])
    if engine.stats.tokens_reused - before < len(prefix):
        raise BenchError("the prefix that was just scored is not in the cache: the warm figure would be a cold one")
    return seconds


def _request(prefix: Ids, items: Ids) -> Request:
    return Request(prefix.tolist(), items.tolist())


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
