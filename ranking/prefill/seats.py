"""Attention whose segment bounds are tensors that never move: what a pass needs so that it can be recorded once and run again.

Bounds have one place for every item and request that a pass could hold; places that are not taken are empty segments at the end.
Rows behind the last segment belong to nobody: no real row reads them, and their answers are never looked at.

Legend: H query heads, G key heads, D dims of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ranking.prefill import kernels
from ranking.prefill.attend import BACKENDS, Attend, BackendMissing, blend
from ranking.prefill.cascade import Pair
from ranking.prefill.kernels import Bounds, Placed

PlacedAttend = Callable[[Tensor, Tensor, Tensor, Placed, Placed, bool], tuple[Tensor, Tensor]]
"""(q, k, v, query bounds, key bounds, causal) -> (out, lse): `attend` with bounds on the device."""


def placed(name: str, device: torch.device) -> PlacedAttend:
    """A backend with bounds on the device. Raises BackendMissing if it would have to fetch them from a GPU."""
    if device.type == "cpu":
        return _hosted(BACKENDS[name].attend)
    if name != "cuda_varlen":
        raise BackendMissing(f'passes of fixed size need the backend "cuda_varlen" on {device.type}, this engine has "{name}"')
    return kernels.cuda_varlen_placed


class Seats:
    """`ranking.prefill.cascade.Attention` over fixed bounds; the bounds that the layer loop hands on are not read.

    `seat` says who sits where: `own` bounds of the items' rows, `asking` and `asking_ends` of the requests' rows and last tokens,
    `seen` of their prefixes. A prefix pass is one item over what is known of the prefix.
    """

    def __init__(self, name: str, attend: PlacedAttend, places: tuple[int, int, int], device: torch.device) -> None:
        """`places`: items, requests, tokens of the longest item."""
        items, requests, self._longest = places
        self.name, self._attend = name, attend
        self._sizes = [items + 1, items + 1, requests + 1, requests + 1, requests + 1]
        self.numbers = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self._own, self._ends, self._asking, self._asking_ends, self._seen = self.numbers.split(self._sizes)

    def seat(self, own: Bounds, asking: Bounds, asking_ends: Bounds, seen: Bounds) -> None:
        """The bounds stand on the device, each one's last number repeated to the end."""
        ends = np.arange(len(own), dtype=np.int32)
        rows: list[npt.NDArray[np.int32]] = []
        for bounds, size in zip((own, ends, asking, asking_ends, seen), self._sizes):
            rows += [bounds, np.full(size - len(bounds), bounds[-1], np.int32)]
        self.numbers.copy_(torch.from_numpy(np.concatenate(rows).astype(np.int32)))

    def prefix(self, q: Tensor, keys: Tensor, values: Tensor, start: int, rows: int, out: Tensor) -> None:
        """Rows of a prefix see what is known of it (in the first `start` places, if any) and themselves, causally."""
        found, sums = self._mine(q, keys[start : start + rows], values[start : start + rows], self._own, True)
        if start:
            found = blend(*self._known(q, keys[:start], values[:start], self._asking), found, sums)
        out.copy_(found)

    def items(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Sequence[Pair],
        queries: Sequence[Bounds],  # noqa: ARG002 - the protocol's; here bounds have their own place
        keys: Sequence[Bounds],  # noqa: ARG002
        out: Tensor,
    ) -> None:
        """Items see the one block of keys that holds all prefixes, and themselves; with fewer queries than keys only their last
        tokens ask (a pass has more rows than places for items)."""
        ((seen_k, seen_v),) = prefixes
        whole = len(q) == len(k)
        found, sums = self._mine(q, k, v, self._own if whole else self._ends, whole)
        out.copy_(blend(*self._known(q, seen_k, seen_v, self._asking if whole else self._asking_ends), found, sums))

    def _mine(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return self._attend(q, k, v, (bounds, self._longest), (self._own, self._longest), causal)

    def _known(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        return self._attend(q, k, v, (bounds, max(2, len(q))), (self._seen, max(2, len(k))), False)


def _hosted(attend: Attend) -> PlacedAttend:
    """A backend that takes bounds on the host, as strict as a kernel may be: rows behind the last segment come back as NaN, and
    a segment that is longer than was said is a ValueError."""

    def run(q: Tensor, k: Tensor, v: Tensor, on_q: Placed, on_k: Placed, causal: bool) -> tuple[Tensor, Tensor]:
        cu_q, cu_k = on_q[0].numpy(), on_k[0].numpy()
        taken = int(np.count_nonzero(np.diff(cu_q))) + 1
        cu_q, cu_k = cu_q[:taken], cu_k[:taken]
        for bounds, (_, most) in ((cu_q, on_q), (cu_k, on_k)):
            if np.diff(bounds).max(initial=0) > most:
                raise ValueError(f"a segment of {np.diff(bounds).max()} rows where at most {most} were said")
        out, sums = torch.full_like(q, torch.nan), q.new_full(q.shape[:2], torch.nan, dtype=torch.float32)
        found = attend(q[: cu_q[-1]], k[: cu_k[-1]], v[: cu_k[-1]], cu_q, cu_k, causal)
        out[: cu_q[-1]], sums[: cu_q[-1]] = found
        return out, sums

    return run
