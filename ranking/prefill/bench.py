"""How fast one prefill scores N items, beside one item per pass of the plain Hugging Face model, in the same run."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ranking.prefill.engine import Engine
from ranking.prefill.plan import Request
from retrieval.llama import Size, new_llama

LABELS = (2, 3)
REPEATS = 5
ONE_BY_ONE = 20
"""Items that the slow twin scores; its time per item does not depend on their number."""


@dataclass(frozen=True)
class PrefillShape:
    """P prefix tokens, N items of L tokens each."""

    prefix: int
    items: int
    length: int


def bench_prefill(size: Size, shape: PrefillShape, seed: int = 0) -> dict[str, object]:
    """Seconds per request of both ways, medians of alternating repetitions on fresh tokens, and how far their logits differ."""
    torch.manual_seed(seed)
    model = new_llama(size, size.vocabulary, causal_lm=True)
    assert isinstance(model, LlamaForCausalLM)
    engine = Engine(model, LABELS)
    rng = np.random.default_rng(seed)
    ours, theirs, apart = [], [], 0.0
    for repeat in range(REPEATS + 1):
        request = _fresh(rng, size.vocabulary, shape)
        began = time.perf_counter()
        packed = engine.score([request])[0]
        middle = time.perf_counter()
        single = one_by_one(model, request.prefix, request.items[:ONE_BY_ONE])
        if repeat:  # the first repetition pays for first-use work
            ours.append(middle - began)
            theirs.append((time.perf_counter() - middle) / len(single) * shape.items)
        apart = max(apart, float(np.abs(packed[: len(single)] - single).max()))
    seconds = float(np.median(ours))
    return {
        "seconds": seconds,
        "items_per_second": shape.items / seconds,
        "speedup_one_by_one": float(np.median(np.array(theirs) / np.array(ours))),
        "max_abs_diff": apart,
        "backend": engine.backend,
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def one_by_one(model: LlamaForCausalLM, prefix: Sequence[int], items: Sequence[Sequence[int]]) -> np.ndarray:
    """The slow honest twin: label logits [n, labels] of prefix + item, one full pass of the plain model each."""
    found = np.empty((len(items), len(LABELS)), np.float32)
    with torch.inference_mode():
        for row, item in enumerate(items):
            ids = torch.tensor([[*prefix, *item]])
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            found[row] = (model.get_output_embeddings().weight[list(LABELS)].float() @ hidden.float()).numpy()
    return found


def _fresh(rng: np.random.Generator, vocabulary: int, shape: PrefillShape) -> Request:
    tokens = rng.integers(0, vocabulary, shape.prefix + shape.items * shape.length)
    items = tokens[shape.prefix :].reshape(shape.items, shape.length)
    return Request(tokens[: shape.prefix].tolist(), items.tolist())
