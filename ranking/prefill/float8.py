"""Linear layers whose products are FP8 (e4m3): one scale for each output row of a weight, one for each token of what comes in.

y[t, o] = x_scale[t] * w_scale[o] * sum over i of x[t, i] * w[o, i], written in bfloat16 by `torch._scaled_mm`. Weights are made
small once, rows as they come. The same code runs on a CPU, where it is slow and tested; on a GPU it has not run yet. There the
sum is torch's fast accumulation, which on Hopper keeps fewer bits than float32.

What a CUDA device asks for (torch's own checks): capability 8.9, rows side by side, a transposed weight, both widths multiples
of 16, float32 scales [rows, 1] and [1, outputs], bfloat16 out. The number of rows is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from index.errors import BrewlineError

LARGEST = 448.0
"""The largest value of e4m3."""
CAPABILITY = (8, 9)
"""CUDA compute capability from which on FP8 products exist."""
WIDTH = 16
"""Widths of a weight are multiples of this."""


class Float8Missing(BrewlineError):
    """FP8 products cannot be had for this model, or on this device."""


class Scaled(NamedTuple):
    """Rows as e4m3 values [n, width] times a float32 scale [n, 1] each."""

    values: Tensor
    scales: Tensor

    def wide(self) -> Tensor:
        """The rows that they stand for, float32."""
        return self.values.float() * self.scales


def scaled(rows: Tensor) -> Scaled:
    """The nearest e4m3 values to rows [n, width], whose largest one becomes 448; a row of zeros stays zero."""
    scales = torch.linalg.vector_norm(rows, ord=math.inf, dim=-1, keepdim=True, dtype=torch.float32)
    scales.clamp_min_(1e-12).div_(LARGEST)
    values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    torch.div(rows, scales, out=values)  # divided in float32 and rounded once, without a wide copy
    return Scaled(values, scales)


@dataclass(frozen=True, slots=True)
class Float8:
    """y = x @ weight.T + bias: weight e4m3 [outputs, inputs], scale float32 [outputs, 1], bias and y bfloat16."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def ready(self, x: Tensor) -> Scaled:
        """Rows bfloat16 made small, for several layers that read them."""
        return scaled(x)

    def into(self, x: Tensor | Scaled, out: Tensor) -> None:
        """The product stands in `out` [rows, outputs], contiguous."""
        rows = x if isinstance(x, Scaled) else scaled(x)
        torch._scaled_mm(
            rows.values,
            self.weight.t(),
            scale_a=rows.scales,
            scale_b=self.scale.t(),
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=out,
        )

    def onto(self, x: Tensor | Scaled, out: Tensor) -> None:
        """The product is added to `out` [rows, outputs]."""
        made = torch.empty_like(out)
        self.into(x, made)
        out.add_(made)


class Float8Linear(nn.Module):
    """A layer in the place of a Hugging Face projection: the model's own forward computes what the layer loop computes."""

    def __init__(self, product: Float8) -> None:
        super().__init__()
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in (product.weight, product.scale))
        self.bias = None if product.bias is None else nn.Parameter(product.bias, requires_grad=False)

    @property
    def product(self) -> Float8:
        """Views of the parameters."""
        return Float8(self.weight.detach(), self.scale.detach(), None if self.bias is None else self.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """The product for rows of any leading shape."""
        out = x.new_empty(x.numel() // x.shape[-1], len(self.weight))
        self.product.into(x.reshape(len(out), -1), out)
        return out.view(*x.shape[:-1], -1)


def check_layer(layer: nn.Linear) -> None:
    """Raises Float8Missing unless the layer is bfloat16 and its widths are multiples of 16."""
    if layer.weight.dtype != torch.bfloat16:
        raise Float8Missing(f"FP8 layers are made from a bfloat16 model, got {layer.weight.dtype}; load it in bfloat16")
    if any(size % WIDTH for size in layer.weight.shape):
        seen = "x".join(map(str, layer.weight.shape))
        raise Float8Missing(f"FP8 products need widths that are multiples of {WIDTH}, got a weight of {seen}; take bfloat16")


def check_device(device: torch.device) -> None:
    """Raises Float8Missing unless FP8 products run on the device: a CPU, or a CUDA device of capability 8.9 or more."""
    if device.type == "cuda":
        check_capability(torch.cuda.get_device_capability(device))
    elif device.type != "cpu":
        raise Float8Missing(f"FP8 products run on CUDA devices (and, slowly, on a CPU), not on {device.type}; take bfloat16")


def check_capability(seen: tuple[int, int]) -> None:
    """Raises Float8Missing below capability 8.9."""
    if seen < CAPABILITY:
        wanted, found = (".".join(map(str, part)) for part in (CAPABILITY, seen))
        raise Float8Missing(f"FP8 products need a GPU of capability {wanted} (H100, L40S), this one has {found}; take bfloat16")
