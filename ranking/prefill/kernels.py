"""Packed attention by two kernels of torch: the variable-length kernel for CUDA, and flex attention as an independent check.

Both have the interface of `ranking.prefill.attend`, which registers them and checks the segments; both are imported on first use.

Legend: Tq, Tk packed rows, H query heads, G key heads, D dims of a head, S segments.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from index.errors import BrewlineError

Bounds = npt.NDArray[np.int32]
Placed = tuple[Tensor, int]
"""Bounds int32 [S+1] on the device, and how long the longest segment may be."""
TILE = 128
"""Rows and columns of one block of flex attention's mask."""


class ForwardOnly(BrewlineError):
    """Gradients are wanted from a kernel whose log-sum-exp has none."""


def cuda_varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Bounds, cu_k: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    """Return out [Tq,H,D] and lse float32 [Tq,H] by torch's variable-length flash kernel, all segments in one launch.

    q [Tq,H,D], k and v [Tk,G,D] in bfloat16 or float16, bounds int32 [S+1] on the host that cover every row. Nothing waits for
    the device once the bounds are there. Raises ForwardOnly under autograd: the kernel's backward leaves out the gradient of the
    log-sum-exp, so a merge would learn something wrong in silence. Source: torch.nn.attention.varlen (torch 2.11 to 2.13).
    """
    return _varlen(q, k, v, cu_q, cu_k, causal, None)


def cuda_varlen_steady(q: Tensor, k: Tensor, v: Tensor, cu_q: Bounds, cu_k: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    """Return what `cuda_varlen` does, a segment's bits not depending on the other segments: its keys are never split.

    Raises NotImplementedError before torch 2.12, which cannot be told not to split.
    """
    return _varlen(q, k, v, cu_q, cu_k, causal, 1)


def cuda_varlen_placed(q: Tensor, k: Tensor, v: Tensor, on_q: Placed, on_k: Placed, causal: bool) -> tuple[Tensor, Tensor]:
    """Return what `cuda_varlen` does for bounds that lie on the device and never travel: what a CUDA graph can record.

    Bounds may end before the last row: rows behind them hold anything in the answer. Segments may be empty on both sides; the
    longest may be named longer than it is (at least 2, so that the kernel takes its common path).
    """
    out, sums = _launch(q, k, v, on_q, on_k, causal, None)
    return out, sums.t() if _heads_first(q.device, False, None) else sums


def flex(q: Tensor, k: Tensor, v: Tensor, cu_q: Bounds, cu_k: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    """Return out [Tq,H,D] and lse float32 [Tq,H] by flex attention: a second opinion, not a fast path.

    Compiled on CUDA (D of 16 or more); elsewhere eager, which holds all Tq x Tk scores. Bounds cover every row.
    """
    if not len(q):
        return _nothing(q)
    from torch.nn.attention.flex_attention import AuxRequest

    mask = segment_mask(cu_q, cu_k, causal, q.device)
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    with warnings.catch_warnings():
        # Said once per process when eager, and why eager is for checks only.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        run = _flex(q.device.type)
        out, aux = run(*heads, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1).float()


def segment_mask(cu_q: Bounds, cu_k: Bounds, causal: bool, device: torch.device) -> Any:
    """Return the BlockMask under which every query sees the keys of its segment, with `causal` those up to its own row.

    Its blocks follow from the bounds: the keys that a tile of queries sees lie side by side. torch's builder tries every pair.
    """
    from torch.nn.attention.flex_attention import BlockMask

    segment_q, place_q = _places(cu_q)
    segment_k, place_k = _places(cu_k)
    starts = np.arange(0, len(segment_q), TILE)
    last = np.minimum(starts + TILE, len(segment_q)) - 1
    ends = cu_k[segment_q[last]] + place_q[last] + 1 if causal else cu_k[segment_q[last] + 1]
    first = cu_k[segment_q[starts]] // TILE
    counts = -(-ends // TILE) - first
    columns = -(-len(segment_k) // TILE)
    blocks = np.minimum(first[:, None] + np.arange(columns), columns - 1)
    on = [torch.tensor(x, device=device) for x in (segment_q, place_q, segment_k, place_k)]

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = on[0][query] == on[2][key]
        return same & (on[1][query] >= on[3][key]) if causal else same

    return BlockMask.from_kv_blocks(
        torch.tensor(counts, dtype=torch.int32, device=device)[None, None],
        torch.tensor(blocks, dtype=torch.int32, device=device)[None, None],
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(len(segment_q), len(segment_k)),
    )


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Any] = flex_attention
    return torch.compile(run, dynamic=True) if device == "cuda" else run


def _places(bounds: Bounds) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For every row the number of its segment and its place in it."""
    lengths = np.diff(bounds)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    return segment, np.arange(len(segment)) - bounds[:-1].astype(np.int64)[segment]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Bounds, cu_k: Bounds, causal: bool, splits: int | None
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(rows.requires_grad for rows in (q, k, v)):
        raise ForwardOnly("cuda_varlen has no gradient of its log-sum-exp: train with another backend, or run without grad")
    if not len(q):
        return _nothing(q)
    on_q, on_k = _placed(cu_q.tobytes(), q.device), _placed(cu_k.tobytes(), q.device)
    out, sums = _launch(q, k, v, on_q, on_k, causal, splits)
    if _heads_first(q.device, on_q[1] == 1, splits):
        sums = sums.t()
    if sums.shape != q.shape[:2]:
        raise RuntimeError(f"varlen_attn of torch {torch.__version__} gave sums {tuple(sums.shape)} for {tuple(q.shape[:2])}")
    return out, sums


def _launch(
    q: Tensor, k: Tensor, v: Tensor, on_q: Placed, on_k: Placed, causal: bool, splits: int | None
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    (bounds_q, longest_q), (bounds_k, longest_k) = on_q, on_k
    aux, window = AuxRequest(lse=True), (-1, 0 if causal else -1)
    options = _options(splits)
    run: Callable[..., tuple[Tensor, Tensor]] = varlen_attn  # type: ignore[assignment]  # a pair, because of `aux`
    return run(q, k, v, bounds_q, bounds_k, longest_q, longest_k, return_aux=aux, window_size=window, **options)


@functools.cache
def _options(splits: int | None) -> dict[str, Any]:
    """What this torch must and can be told. Before `enable_gqa` existed (2.11) grouped heads went to the kernel unasked."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if splits is not None and "num_splits" not in known:
        raise NotImplementedError("varlen_attn has no num_splits, so its sums may be split by what else is in the batch")
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    return grouped if splits is None else grouped | {"num_splits": splits}


@functools.cache
def _heads_first(device: torch.device, single: bool, splits: int | None) -> bool:
    """Whether the sums come as [H, Tq]: asked once of 3 rows and 4 heads, since a call with H = Tq could not tell.

    `single`: with one query per segment the kernel takes another path when heads are grouped.
    """
    q, k = torch.zeros(3, 4, 16, dtype=torch.bfloat16, device=device), torch.zeros(3, 2, 16, dtype=torch.bfloat16, device=device)
    bounds = np.array([0, 1, 2, 3] if single else [0, 3], np.int32)
    placed = _placed(bounds.tobytes(), device)
    shape = tuple(_launch(q, k, k, placed, placed, False, splits)[1].shape)
    if shape not in ((4, 3), (3, 4)):
        raise NotImplementedError(f"varlen_attn gives log-sum-exps of shape {shape} for 3 rows and 4 heads")
    return shape == (4, 3)


@functools.lru_cache(maxsize=64)
def _placed(raw: bytes, device: torch.device) -> Placed:
    """Bounds on the device and their longest segment: copied for a pass's first layer and found again by the others."""
    bounds = np.frombuffer(raw, np.int32)
    with torch.inference_mode(False):  # kept beyond the call that asked first, and not only for calls in its mode
        return torch.tensor(bounds, device=device), int(np.diff(bounds).max(initial=0))


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
