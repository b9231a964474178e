"""Methods of `index.bench` that need a GPU: the certified scan of `index.gpu_scan`, and torch's matmul and topk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from index.bench import Ready, Setting
from index.gpu_code import GpuCodes
from index.hits import Rows, Vectors

if TYPE_CHECKING:
    import torch

_SCORES = 1 << 30
"""Scores that the contender holds at a time."""
_KINDS: tuple[GpuCodes, ...] = ("int8", "float16")


def top_of_products_on_device(queries: torch.Tensor, vectors: torch.Tensor, k: int) -> torch.Tensor:
    """The rows int64 [Q, min(k, N)] of the largest products, best first, are returned: matmul and topk, vectors cut to fit."""
    import torch

    step = max(k, _SCORES // max(1, len(queries)))
    best, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step]
        scores, found = torch.topk(queries @ part.T, min(k, len(part)))
        best, rows = torch.cat([best, scores], 1), torch.cat([rows, found + start], 1)
        if start:
            best, at = torch.topk(best, min(k, best.shape[1]))
            rows = rows.gather(1, at)
    return rows


def _exact(vectors: Vectors) -> Iterator[Ready]:
    from index.gpu_scan import GpuExact

    for kind in _KINDS:
        started = time.perf_counter()
        search = GpuExact(vectors, codes=kind)

        def find(search: GpuExact, queries: Vectors, k: int) -> Rows:
            return search.search(queries, k).rows

        settings = [Setting(f"exact, certified, {kind}", partial(find, search), search.bytes)]
        yield Ready("gpu-exact", time.perf_counter() - started, settings)
        del search, settings


def _torch(vectors: Vectors) -> Iterator[Ready]:
    import torch

    for dtype in (torch.float32, torch.float16):
        started = time.perf_counter()
        there = torch.tensor(vectors, device="cuda").to(dtype)

        def find(there: torch.Tensor, queries: Vectors, k: int) -> Rows:
            asked = torch.tensor(queries, device="cuda").to(there.dtype)
            rows: Rows = top_of_products_on_device(asked, there, k).cpu().numpy()
            return rows

        name = str(dtype).removeprefix("torch.")
        settings = [Setting(f"matmul, topk, {name}", partial(find, there), there.numel() * there.element_size())]
        yield Ready("gpu-torch", time.perf_counter() - started, settings)
        del there, settings


GPU_METHODS: dict[str, Callable[[Vectors], Iterator[Ready]]] = {"gpu-exact": _exact, "gpu-torch": _torch}
