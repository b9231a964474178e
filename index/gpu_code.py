"""Vectors coded for a scan on a GPU (`index.gpu_scan`), the memory that takes, and whether there is such a GPU.

As in `index.certified_codes`: blocks of rows with like largest numbers, one step for each, losses measured. Steps for single
vectors, the alternative, would cost a load and a multiplication for every product; one for a block leaves one comparison.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from index.certified_codes import BLOCK
from index.hits import SearchError, Vectors
from index.int8 import LEVELS

if TYPE_CHECKING:
    import torch

GpuCodes = Literal["int8", "float16"]
_AT_ONCE = 32
"""Blocks coded together: at 128 dims their float64 differences take 64 MiB."""
_SAFE = 1 + 1e-9
_FLOOR = float(np.finfo(np.float32).tiny) * 2**24
_ROUNDING = 2.0**-23
"""Twice the unit roundoff of float32: the score's own rounding, and room."""
_TENSOR_CORES = 2.0**-22
"""What one float32 addition of a tensor core may lose: it cuts off where the processor rounds."""
_NEVER = 1e300


def gpu_reason(device: str = "cuda") -> str:
    """Why the kernels cannot run on this device is returned, "" where they can ("cpu": in Triton's interpreter only)."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (extra `kernels`)"
    import torch

    if device == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "on a CPU the kernels run only with TRITON_INTERPRET=1, set before triton is imported"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def code_width(dims: int) -> int:
    """The numbers of one vector's codes: the dims, filled with zeros to a multiple of 32, the shortest that tensor cores take."""
    return -(-dims // 32) * 32


def on_device(vectors: Vectors | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The vectors float32 [N, D] are returned on the device, copied piece by piece unless they are a tensor."""
    import torch

    if isinstance(vectors, torch.Tensor):
        return vectors.to(device, torch.float32).contiguous()
    held = torch.empty(vectors.shape, dtype=torch.float32, device=device)
    for start in range(0, len(vectors), _AT_ONCE * BLOCK):
        piece = np.array(vectors[start : start + _AT_ONCE * BLOCK], dtype=np.float32)
        held[start : start + len(piece)] = torch.from_numpy(piece)
    return held


def stays(vectors: Vectors | torch.Tensor, device: torch.device) -> bool:
    """Whether `on_device` gives these vectors back as they are, without a copy, is returned."""
    import torch

    if not isinstance(vectors, torch.Tensor):
        return False
    return vectors.device == device and vectors.dtype == torch.float32 and vectors.is_contiguous()


@dataclass(frozen=True, slots=True)
class Held:
    """Vectors [N, D] on the device, or anywhere in host memory (a mapped file will do)."""

    vectors: Vectors | torch.Tensor
    device: torch.device

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows (int64 [n] on the device) are returned as float32 [n, D] on the device."""
        import torch

        if isinstance(self.vectors, torch.Tensor):
            return self.vectors[rows]
        return torch.from_numpy(np.array(self.vectors[rows.cpu().numpy()], dtype=np.float32)).to(self.device)


@dataclass(frozen=True, slots=True)
class GpuCoded:
    """N vectors in B blocks: codes int8 or float16 [B * BLOCK, code_width(D)], rows int32 [B * BLOCK] (-1 at the end).

    facts float64 [3, B]: the step of each block, its longest vector, its largest loss (length of vector minus codes).
    """

    codes: torch.Tensor
    rows: torch.Tensor
    facts: torch.Tensor

    @property
    def bytes(self) -> int:
        """Memory of all three."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.rows, self.facts))


def coded_memory(count: int, dims: int, kind: GpuCodes) -> int:
    """`GpuCoded.bytes` of so many vectors is returned before they are coded."""
    blocks = -(-count // BLOCK)
    return blocks * (BLOCK * (code_width(dims) * (1 if kind == "int8" else 2) + 4) + 3 * 8)


def code_on_device(held: Held, kind: GpuCodes) -> GpuCoded:
    """The vectors are returned coded, on their device. Raises SearchError for NaN or infinity."""
    import torch

    (count, dims), device = held.vectors.shape, held.device
    blocks, dtype = -(-count // BLOCK), torch.int8 if kind == "int8" else torch.float16
    order = torch.sort(_largest(held), stable=True).indices
    codes = torch.zeros(blocks, BLOCK, code_width(dims), dtype=dtype, device=device)
    rows = torch.full((blocks * BLOCK,), -1, dtype=torch.int32, device=device)
    rows[:count] = order
    facts = torch.zeros(3, blocks, dtype=torch.float64, device=device)
    for start in range(0, blocks, _AT_ONCE):
        here = order[start * BLOCK : (start + _AT_ONCE) * BLOCK]
        part = torch.zeros(-(-len(here) // BLOCK), BLOCK, dims, device=device)
        part.view(-1, dims)[: len(here)] = held.take(here)
        stop = start + len(part)
        steps = _steps(part.abs().amax((1, 2)), kind)
        codes[start:stop, :, :dims] = _coded(part, steps[:, None, None], kind)
        decoded = codes[start:stop, :, :dims].double() * steps[:, None, None]
        lengths = part.double().norm(dim=2).amax(1)
        facts[:, start:stop] = torch.stack([steps, lengths, (part.double() - decoded).norm(dim=2).amax(1)])
    return GpuCoded(codes.flatten(0, 1), rows, facts)


def _largest(held: Held) -> torch.Tensor:
    """The largest absolute number of each vector, float32 [N]."""
    import torch

    count = len(held.vectors)
    largest = torch.empty(count, device=held.device)
    for start in range(0, count, _AT_ONCE * BLOCK):
        stop = min(count, start + _AT_ONCE * BLOCK)
        piece: Any = held.vectors[start:stop]
        largest[start:stop] = on_device(piece, held.device).abs().amax(1)
    bad = torch.nonzero(~torch.isfinite(largest))
    if len(bad):
        raise SearchError(f"vector {int(bad[0])} holds NaN or infinity: the vectors are damaged, build them again")
    return largest


def _steps(largest: torch.Tensor, kind: GpuCodes) -> torch.Tensor:
    """The step with which numbers up to `largest` are coded, float64; never 0."""
    return (largest.double() / (LEVELS if kind == "int8" else 1)).clamp(min=_FLOOR)


def _coded(numbers: torch.Tensor, steps: torch.Tensor, kind: GpuCodes) -> torch.Tensor:
    import torch

    scaled = numbers * (1 / steps).float()
    return scaled.round().clamp(-LEVELS, LEVELS).to(torch.int8) if kind == "int8" else scaled.clamp(-1, 1).half()


@dataclass(frozen=True, slots=True)
class GpuAsked:
    """Q queries on the device: vectors float32 [Q, D], codes [Q, code_width(D)], and what bounds their products.

    facts float64 [4, Q]: steps, lost (length of query minus codes), length of the codes decoded, length of the query.
    """

    vectors: torch.Tensor
    codes: torch.Tensor
    facts: torch.Tensor

    @classmethod
    def of(cls, queries: Vectors, device: torch.device, kind: GpuCodes) -> GpuAsked:
        """Checked queries [Q, D] are returned coded."""
        import torch

        vectors = torch.tensor(queries, device=device)
        steps = _steps(vectors.abs().amax(1), kind)
        codes = torch.zeros(len(queries), code_width(queries.shape[1]), device=device)
        codes = codes.to(torch.int8 if kind == "int8" else torch.float16)
        codes[:, : queries.shape[1]] = _coded(vectors, steps[:, None], kind)
        decoded = codes[:, : queries.shape[1]].double() * steps[:, None]
        exact = vectors.double()
        return cls(vectors, codes, torch.stack([steps, (exact - decoded).norm(dim=1), decoded.norm(dim=1), exact.norm(dim=1)]))

    def wishes(self, asked: torch.Tensor, bars: torch.Tensor, wide: int) -> torch.Tensor:
        """What the kernel makes bars of, float64 [3, wide], for these queries (int64 [A]) and the scores wanted; then nothing.

        The bound is that of `index.certified_codes.Asked.of`: |q.x - q'.x'| <= |q - q'| |x| + |q'| |x - x'| and what float32 may
        lose; fp16 products are also summed in float32. A vector that can reach `bars` has a product of at least
        (w - a * longest - c * loss) / step in its block.
        """
        import torch

        steps, lost, decoded, length = self.facts[:, asked]
        dims = self.vectors.shape[1]
        summed = 0.0 if self.codes.dtype == torch.int8 else (self.codes.shape[1] + 2) * _TENSOR_CORES
        per_length = lost * _SAFE + (dims + 2) * _ROUNDING * length + summed * decoded
        wishes = torch.full((3, wide), 0.0, dtype=torch.float64, device=bars.device)
        wishes[0] = _NEVER
        wishes[:, : len(asked)] = torch.stack([bars - dims * 1e-44, per_length, decoded * (_SAFE + summed)]) / steps
        return wishes
