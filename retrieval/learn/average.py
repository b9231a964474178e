"""The mean of the weights that a run's last steps leave, instead of those that its very last step leaves.

An optimizer that sees samples ends beside the place that it circles; the mean of its path is nearer (Polyak and Juditsky 1992).
For networks, the mean of the weights of a run's last part: Izmailov et al. 2018, arXiv 1803.05407. Every step of that part counts
the same, and the learning rate follows its schedule as without it: the steps themselves are not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


class Average:
    """Running means of trained weights, one tensor of the weight's shape each, spread over processes where the weight is.

    They take their room from the start, so that a checkpoint holds the same tensors at any step. Each is a mean of what this
    process holds; processes whose weights are equal have equal means, and nothing is sent.
    """

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]], steps: int, share: float) -> None:
        """Of a run of `steps` the last `share` (above 0, at most 1), at least one step. `weights` by name; they are kept."""
        self.first = steps - max(1, round(share * steps))
        self._weights = dict(weights)
        self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def take(self, done: int) -> None:
        """Counts the weights as they are after step number `done` (from 1), if it is one of the last. Once a step."""
        if done <= self.first:
            return
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._means[name].lerp_(weight, 1 / (done - self.first))

    def put(self) -> None:
        """Writes the means into the weights."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._means[name])

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The means by name, as a checkpoint keeps and fills them."""
        for name, mean in self._means.items():
            yield f"average.{name}", mean
