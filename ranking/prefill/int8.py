"""Linear layers on a CPU whose products are int8 x int8 -> int32: one scale for each output row of a weight, one for each token.

y[t, o] = x_scale[t] * w_scale[o] * sum over i of x[t, i] * w[o, i]. The sum is exact, everything else float32. Weights are made
small once, rows as they come. A product is cheap here and passes over memory are not, so sums are turned into numbers where they
lie, in blocks of rows that stay in the cache (`block_rows`), and rows and spare outputs live in buffers that a `Workspace` keeps.

The scale of a row is its largest magnitude over 127. One that is not finite gives answers that are not, in every column.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from index.errors import BrewlineError
from ranking.prefill.float8 import Scaled
from ranking.prefill.workspace import Workspace

LARGEST = 127.0
"""Codes span -127..127."""
LEAST = 1e-30
"""Smaller magnitudes count as zero, so that a scale has an inverse."""
LEAST_WIDTH = 2
"""torch's int8 product of single columns is wrong."""
ROOM = 3 << 16
"""Rows of a block times the MLP's width: both its halves, the widest thing between two attentions, then take 1.5 MiB."""
LEAST_ROWS, MOST_ROWS = 256, 2_048
"""Fewer rows read the weights too often, more leave the cache whatever their width."""


class Int8Missing(BrewlineError):
    """Int8 products cannot be had for this model, or on this device."""


def on_grid(weight: Tensor) -> Scaled:
    """The int8 values and scales [outputs, 1] nearest to a weight [outputs, inputs]; those of an int8 weight are found exactly.

    Exactly: where float32 values are q * scale, and the scale was a row's largest magnitude over 127 (`ranking.learn.quantize`),
    the largest value over 127 is that scale again, to the last bit: 127 * scale rounds by less than the division forgets.
    """
    wide = weight.float()
    scales = wide.abs().amax(1, keepdim=True).clamp_min_(LEAST).div_(LARGEST)
    return Scaled((wide / scales).round_().to(torch.int8), scales)


def small_rows(x: Tensor, space: Workspace) -> Scaled:
    """The nearest int8 values to rows float32 [n, width], whose largest magnitude becomes 127; the next rows overwrite them."""
    wide = space.take("wide", tuple(x.shape), torch.float32, x.device)
    values = space.take("values", tuple(x.shape), torch.int8, x.device)
    scales, inverse = (space.take(name, (len(x), 1), torch.float32, x.device) for name in ("scales", "inverse"))
    # Not vector_norm: its largest magnitude takes fifteen times as long on a CPU, more than the product that waits for it.
    torch.amax(torch.abs(x, out=wide), 1, keepdim=True, out=scales)
    scales.clamp_min_(LEAST).div_(LARGEST)
    torch.reciprocal(scales, out=inverse)
    values.copy_(torch.mul(x, inverse, out=wide).round_())
    return Scaled(values, scales)


@dataclass(frozen=True, slots=True)
class Int8:
    """y = x @ weight.T + bias: weight int8 [outputs, inputs], scale float32 [outputs, 1], bias and y float32.

    What `ready` returns lies in `space` until the next call of any layer that shares it.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    space: Workspace

    def ready(self, x: Tensor) -> Scaled:
        """Rows float32 made small, for several layers that read them."""
        return small_rows(x, self.space)

    def into(self, x: Tensor | Scaled, out: Tensor) -> None:
        """The product stands in `out` [rows, outputs]."""
        rows = x if isinstance(x, Scaled) else self.ready(x)
        wide = out if out.is_contiguous() else self._spare(out)
        self._sums(rows, wide)
        torch.mul(wide, rows.scales, out=out)
        if self.bias is None:
            out.mul_(self.scale.t())
        else:
            torch.addcmul(self.bias, out, self.scale.t(), out=out)

    def onto(self, x: Tensor | Scaled, out: Tensor) -> None:
        """The product is added to `out` [rows, outputs]."""
        rows = x if isinstance(x, Scaled) else self.ready(x)
        wide = self._spare(out)
        self._sums(rows, wide)
        out.addcmul_(wide.mul_(self.scale.t()), rows.scales)
        if self.bias is not None:
            out.add_(self.bias)

    def _sums(self, rows: Scaled, wide: Tensor) -> None:
        """The sums [rows, outputs] stand in `wide` as float32: multiplied into its memory as int32 and converted in place."""
        sums = wide.view(torch.int32)
        torch._int_mm(rows.values, self.weight.t(), out=sums)
        wide.copy_(sums)

    def _spare(self, out: Tensor) -> Tensor:
        return self.space.take("spare", tuple(out.shape), torch.float32, out.device)


def block_rows(mlp: int) -> int:
    """How many rows pass together through the layers of a model with an MLP of this width."""
    return min(MOST_ROWS, max(LEAST_ROWS, ROOM // mlp))


class Int8Linear(nn.Module):
    """A layer in the place of a Hugging Face projection: the model's own forward computes what the layer loop computes."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in (weight, scale))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def product(self, space: Workspace) -> Int8:
        """The layer over views of the parameters, with a place for its rows."""
        return Int8(self.weight.detach(), self.scale.detach(), None if self.bias is None else self.bias.detach(), space)

    def forward(self, x: Tensor) -> Tensor:
        """The product for rows of any leading shape."""
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(rows), len(self.weight))
        self.product(Workspace()).into(rows, out)
        return out.view(*x.shape[:-1], len(self.weight))


def check_layer(layer: nn.Linear) -> None:
    """Raises Int8Missing unless the layer is float32 and reads at least two columns."""
    if layer.weight.dtype != torch.float32:
        raise Int8Missing(f"int8 layers are made from a float32 model, got {layer.weight.dtype}; load it in float32")
    if layer.weight.shape[1] < LEAST_WIDTH:
        raise Int8Missing("int8 products need weights of two columns or more, got one; take float32")


def check_device(device: torch.device) -> None:
    """Raises Int8Missing unless int8 products run on the device and are right there."""
    if device.type != "cpu":
        raise Int8Missing(f'int8 products run on a CPU, not on {device.type}; take "fp8" or "bfloat16" there')
    if reason := _wrong():
        raise Int8Missing(f'int8 products {reason}; take "float32"')


@functools.cache
def _wrong() -> str:
    """What is wrong with int8 products of extreme values on this CPU, "" if nothing: without dot-product instructions sums of
    two products may saturate."""
    pattern = torch.tensor([127, -127, 127, 1, 0, -1, 127], dtype=torch.int8)
    rows, weight = pattern.repeat(64)[: 8 * 48].view(8, 48), pattern.repeat(128)[: 16 * 48].view(16, 48)
    weight[0] = rows[0] = LARGEST
    try:
        sums = torch._int_mm(rows, weight.t())
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"do not run with torch {torch.__version__}: {error}"
    return "" if torch.equal(sums, rows.int() @ weight.int().t()) else "come out wrong on this processor"
