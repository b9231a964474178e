"""The serving attention with a gradient: the same two calls per layer, and a backward pass without any mask either.

The backward of softmax attention over a set of keys needs the queries' final output and log-sum-exp and one part of the
keys at a time (the observation behind ring attention, arXiv 2310.01889). So each part's backward kernel is called with the
merged values, and the gradients of the parts add up exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranking.prefill.attend import Bounds, cpu_flash, equal_runs, merge, probe, reference
from ranking.prefill.llama import Layout, Mixer, cascade


def training_mixer(device: str) -> Mixer:
    """Return differentiable attention for a torch device type: the blocked CPU kernel where it works, else the reference."""
    return flash_mixer if not probe("cpu_flash", device) else cascade(reference)


def flash_mixer(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, layout: Layout) -> Tensor:
    """Attention as `ranking.prefill.llama.Mixer`, differentiable in all tensors."""
    out: Tensor = _Cascade.apply(q, k, v, prefix_k, prefix_v, layout)
    return out


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, layout: Layout) -> Tensor:
        row, first = layout.first_cross, layout.first_key
        out, lse = cpu_flash(q, k[first:], v[first:], layout.queries, layout.keys, layout.causal)
        seen = cpu_flash(q[row:], prefix_k, prefix_v, layout.cross_queries, layout.cross_keys, False)
        merged, merged_lse = merge(*seen, out[row:], lse[row:])
        if row:
            merged, merged_lse = torch.cat((out[:row], merged)), torch.cat((lse[:row], merged_lse))
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, merged, merged_lse)
        ctx.layout = layout
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        layout: Layout = ctx.layout
        grad, row, first = gradients[0].contiguous(), layout.first_cross, layout.first_key
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dpk, dpv = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
        own = (k[first:], v[first:], dk[first:], dv[first:])
        _add_gradients(grad, q, out, lse, dq, own, layout.queries, layout.keys, layout.causal)
        bounds = layout.cross_queries, layout.cross_keys
        _add_gradients(grad[row:], q[row:], out[row:], lse[row:], dq[row:], (prefix_k, prefix_v, dpk, dpv), *bounds, False)
        return dq, dk, dv, dpk, dpv, None


def _add_gradients(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    keys: tuple[Tensor, Tensor, Tensor, Tensor],
    cu_q: Bounds,
    cu_k: Bounds,
    causal: bool,
) -> None:
    """Add one part's gradients: to dq, and to the last two of `keys` = (k, v, dk, dv)."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    k, v, dk, dv = keys
    for run in equal_runs(np.asarray(cu_q), np.asarray(cu_k)):
        rows = [run.view_q(x) for x in (grad, q)]
        found = op(*rows, run.view_k(k), run.view_k(v), run.view_q(out), run.view_q(lse[..., None])[..., 0], 0.0, causal)
        run.view_q(dq).add_(found[0])
        run.view_k(dk).add_(found[1])
        run.view_k(dv).add_(found[2])
