"""Attention over packed segments, with the log-sum-exp that lets two partial answers be merged exactly.

`attend(q, k, v, cu_q, cu_k, causal) -> (out, lse)` is the whole interface. Segment i has the queries
`cu_q[i]:cu_q[i+1]` and sees the keys `cu_k[i]:cu_k[i+1]` of the same segment, all of them or, with `causal`, those up to
its own row. Softmax attention over two disjoint sets of keys is the average of the two answers weighted by their
exponentiated log-sum-exp, so "items see the prefix" and "items see themselves" are two plain calls and one `merge`.

Backends register here. Which one can run, in which precision, is probed once, at first use, on tiny problems with known answers.

Legend: Tq, Tk packed rows, H query heads, G key heads (H is a multiple of G), D dims of a head, S segments.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from index.errors import BrewlineError
from ranking.prefill import kernels

log = logging.getLogger(__name__)

Bounds = npt.NDArray[np.int32]
Attend = Callable[[Tensor, Tensor, Tensor, Bounds, Bounds, bool], tuple[Tensor, Tensor]]
HALF = (torch.bfloat16, torch.float16)


class BackendMissing(BrewlineError):
    """A required attention backend cannot run here."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to compute attention, the torch device types it is made for and the precisions it takes."""

    name: str
    attend: Attend
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_q: Bounds, cu_k: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    """Return attention computed the plain way in float32: the oracle of every other backend.

    q [Tq,H,D], k and v [Tk,G,D], bounds int32 [S+1] on the host. Returns out [Tq,H,D] in q's dtype and lse float32 [Tq,H].
    Differentiable by autograd, lse included. Raises ValueError if causal segments have different numbers of queries and keys.
    """
    _check_segments(cu_q, cu_k, causal)
    groups = q.shape[1] // k.shape[1]
    outs, sums = [], []
    for (q0, q1), (k0, k1) in zip(_pairs(cu_q), _pairs(cu_k)):
        keys = k[k0:k1].float().repeat_interleave(groups, 1)
        values = v[k0:k1].float().repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1].float(), keys) * q.shape[-1] ** -0.5
        if causal:
            scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), values))
        sums.append(lse.transpose(0, 1))
    if not outs:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    return torch.cat(outs).to(q.dtype), torch.cat(sums)


def cpu_flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Bounds, cu_k: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
    """Return attention by the blocked CPU kernel of torch that also returns the log-sum-exp, heads grouped natively.

    Shapes as `reference`. Consecutive segments of equal lengths are one call on views, without gathering or padding.
    Source: aten `_scaled_dot_product_flash_attention_for_cpu` (not part of torch's public interface, hence the probe).
    """
    _check_segments(cu_q, cu_k, causal)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = list(equal_runs(cu_q, cu_k))
    outs, sums = [], []
    for run in found:
        out, lse = op(*run.views(q, k, v), 0.0, causal)
        outs.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
        sums.append(lse.transpose(1, 2).reshape(-1, q.shape[1]))
    if len(found) == 1:
        return outs[0], sums[0]
    if not found:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    return torch.cat(outs), torch.cat(sums)


def blend(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Return attention [T,H,D] over the union of two disjoint key sets, from the answers over each.

    Computed in float32, it comes back in the dtype of `out_b`.
    """
    weight = torch.sigmoid(lse_a.float() - lse_b.float())[..., None]
    return torch.lerp(out_b.float(), out_a.float(), weight).to(out_b.dtype)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return `blend` and the log-sum-exp [T,H] over the union: what a backward pass or a further merge needs."""
    return blend(out_a, lse_a, out_b, lse_b), torch.logaddexp(lse_a.float(), lse_b.float())


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive segments that all have `queries` queries and `keys` keys."""

    first_q: int
    first_k: int
    segments: int
    queries: int
    keys: int

    def views(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The run's rows as [segments, heads, rows, D], without a copy when the rows are contiguous."""
        return self.view_q(q), self.view_k(k), self.view_k(v)

    def view_q(self, rows: Tensor) -> Tensor:
        """The run's query rows of any [Tq, heads, ...] tensor as [segments, heads, queries, ...]."""
        return _batch(rows, self.first_q, self.segments, self.queries)

    def view_k(self, rows: Tensor) -> Tensor:
        """The run's key rows of a [Tk, heads, D] tensor as [segments, heads, keys, D]."""
        return _batch(rows, self.first_k, self.segments, self.keys)


def equal_runs(cu_q: Bounds, cu_k: Bounds) -> Iterator[Run]:
    """Yield the longest runs of consecutive segments with equal numbers of queries and of keys."""
    queries, keys = np.diff(cu_q), np.diff(cu_k)
    if not len(queries):
        return
    changes = np.flatnonzero((np.diff(queries) != 0) | (np.diff(keys) != 0)) + 1
    edges = [0, *changes.tolist(), len(queries)]
    for start, stop in itertools.pairwise(edges):
        yield Run(int(cu_q[start]), int(cu_k[start]), stop - start, int(queries[start]), int(keys[start]))


def _batch(rows: Tensor, first: int, segments: int, length: int) -> Tensor:
    part = rows[first : first + segments * length]
    return part.view(segments, length, *rows.shape[1:]).transpose(1, 2)


def _pairs(bounds: Bounds) -> list[tuple[int, int]]:
    edges = bounds.tolist()
    return list(itertools.pairwise(edges))


def _check_segments(cu_q: Bounds, cu_k: Bounds, causal: bool) -> None:
    if len(cu_q) != len(cu_k):
        raise ValueError(f"{len(cu_q) - 1} query segments but {len(cu_k) - 1} key segments")
    if causal and not np.array_equal(np.diff(cu_q), np.diff(cu_k)):
        raise ValueError("causal attention needs as many keys as queries in every segment")


def _checked(attend: Attend) -> Attend:
    @functools.wraps(attend)
    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Bounds, cu_k: Bounds, causal: bool) -> tuple[Tensor, Tensor]:
        _check_segments(cu_q, cu_k, causal)
        return attend(q, k, v, cu_q, cu_k, causal)

    return run


BACKENDS: dict[str, Backend] = {
    "cuda_varlen": Backend("cuda_varlen", _checked(kernels.cuda_varlen), ("cuda",), HALF),
    "cuda_varlen_steady": Backend("cuda_varlen_steady", _checked(kernels.cuda_varlen_steady), ("cuda",), HALF),
    "cpu_flash": Backend("cpu_flash", cpu_flash, ("cpu",)),
    "reference": Backend("reference", reference, ("cpu", "cuda", "mps")),
    "flex": Backend("flex", _checked(kernels.flex), ("cpu", "cuda")),
}
"""Every known backend, fastest first: the first that works on the model's device is the default. `flex` only checks the others:
it stands behind the reference, which works everywhere."""


@functools.cache
def probe(name: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Return "" if the backend works on a device type in a precision, else the reason why not; kept and logged once."""
    if name not in BACKENDS:
        return f"unknown; known are {', '.join(BACKENDS)}"
    backend = BACKENDS[name]
    if device not in backend.devices:
        return f"made for {' and '.join(backend.devices)}, not for {device}"
    if dtype not in backend.dtypes:
        return f"takes {' and '.join(str(known) for known in backend.dtypes)}, not {dtype}"
    try:
        same = _agrees(backend.attend, device, dtype)
    except (RuntimeError, AttributeError, NotImplementedError, ImportError, TypeError, ValueError) as error:
        reason = f"does not run with torch {torch.__version__}: {error}"
    else:
        reason = "" if same else f"disagrees with the reference under torch {torch.__version__}"
    log.info("attention backend %s on %s in %s: %s", name, device, dtype, reason or "works")
    return reason


def _agrees(attend: Attend, device: str, dtype: torch.dtype) -> bool:
    """Whether a backend gives the reference's answers on the same rounded inputs, to twice the precision's rounding step.

    Rows and heads differ in number, so that sums the wrong way round have the wrong shape; one query per segment is a problem of
    its own, because kernels treat it as one.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, heads, 16, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    cu, single = np.array([0, 2, 5], np.int32), np.arange(3, dtype=np.int32)
    allowed = max(1e-5, 2 * torch.finfo(dtype).eps)
    for rows, cu_q, causal in ((q, cu, True), (q, cu, False), (q[:2], single, False)):
        pairs = zip(attend(rows, k, v, cu_q, cu, causal), reference(rows, k, v, cu_q, cu, causal))
        if not all(torch.allclose(got.float(), want.float(), atol=allowed, rtol=allowed) for got, want in pairs):
            return False
    return True


def choose(name: str | None, device: str, dtype: torch.dtype = torch.float32) -> Backend:
    """Return the named backend, or with None the first one that works on the device type in the precision.

    Raises BackendMissing with every reason if the named one (or, with None, each one) cannot run.
    """
    if name is not None:
        if reason := probe(name, device, dtype):
            raise BackendMissing(f'attention backend "{name}" cannot run on {device}: {reason}')
        return BACKENDS[name]
    reasons = {}
    for candidate in BACKENDS:
        reasons[candidate] = probe(candidate, device, dtype)
        if not reasons[candidate]:
            if candidate == "reference":
                log.warning("only the slow reference attention works on %s in %s: %s", device, dtype, reasons)
            return BACKENDS[candidate]
    raise BackendMissing(f"no attention backend runs on {device} in {dtype}: {reasons}")
