"""The one training loop: losses in, weights out, a curve and a checkpoint beside them. Encoder and ranker say what a loss is."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retrieval.learn.checkpoint import TrainingError, load_state, save_state, weight_groups

SPEED_STEPS = 5

Progress = Callable[[int, int], None]
"""Called with (done, total) steps."""


@dataclass(frozen=True)
class Pace:
    """How weights move: AdamW; the learning rate rises linearly over `warmup` of the steps, then falls linearly to zero.

    `clip` bounds the gradient's norm; a checkpoint is written every `checkpoint_seconds`.
    """

    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    checkpoint_seconds: float = 120.0


class Diverged(TrainingError):
    """A loss was no finite number."""


class Loop(ABC):
    """One run: a model, an optimizer and the number of steps done. The subclass gives the loss of the next step."""

    def __init__(
        self,
        model: nn.Module,
        settings: Pace,
        steps: int,
        identity: Mapping[str, object],
        extra: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """`identity` is what, beside steps and settings, a checkpoint must share; `extra` are trained weights by name that
        are no part of the model (and are not clipped)."""
        self.model, self.settings, self.steps = model, settings, steps
        self.identity = {**identity, "steps": steps, "settings": asdict(settings)}
        self.extra = dict(extra or {})
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        # Groups of their own: weights that are spread over processes and whole ones cannot be moved by one call.
        groups = [group for part in (trained, self.extra.values()) for group in weight_groups(part, settings.weight_decay)]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.done = 0
        self.curve: list[dict[str, float]] = []

    @abstractmethod
    def step_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss (scalar, with gradient) of step `self.done`, and what the curve shall say of it beside the loss."""

    def settle(self) -> None:  # noqa: B027 - gradients of one process are ready as they are
        """Makes the gradients of one step ready; called after they were computed and before they are clipped."""

    def due(self, seconds: float) -> bool:
        """Whether a checkpoint is to be written that many seconds after the last."""
        return seconds > self.settings.checkpoint_seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the subclass's own position, as JSON."""
        return {}

    def restore(self, facts: Mapping[str, Any]) -> None:  # noqa: B027 - a loop without a position of its own has none to take back
        """Takes the subclass's position from a checkpoint's facts, which hold what `state` gave."""

    def run(self, until: int, progress: Progress | None = None, checkpoint: Path | None = None) -> None:
        """Trains up to step `until`; with `checkpoint` a killed run goes on from that folder later. Raises Diverged."""
        self.model.train()
        saved = time.monotonic()
        while self.done < until:
            self._step()
            if progress is not None:
                progress(self.done, self.steps)
            if checkpoint is not None and self.due(time.monotonic() - saved):
                self.save(checkpoint)
                saved = time.monotonic()
        self.model.eval()

    def _step(self) -> None:
        rate = self.settings.learning_rate * schedule(self.done, self.steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, measures = self.step_loss()
        if not torch.isfinite(loss):
            raise Diverged(f"the loss became {float(loss.detach())} at step {self.done}; lower the learning rate ({rate:.2g})")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.settle()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.done += 1
        self.curve.append({"step": self.done, "loss": float(loss.detach()), **measures})

    def save(self, folder: Path) -> None:
        """Writes weights, optimizer state and position, whole or not at all."""
        facts = {"step": self.done, "curve": self.curve, **self.state()}
        save_state(folder, self._weights(), self.optimizer, facts, self.identity)

    def resume(self, folder: Path) -> bool:
        """Goes on where a checkpoint of the same training stopped; False if there is none. Raises TrainingError on another."""
        facts = load_state(folder, self._weights(), self.optimizer, self.identity)
        if facts is None:
            return False
        self.done, self.curve = facts["step"], facts["curve"]
        self.restore(facts)
        return True

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield from self.extra.items()


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the full learning rate at a step: a function of the step alone, so that a rerun takes the same path."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))


def seconds_per_step(loop: Loop, clock: Callable[[], float] = time.monotonic, steps: int = SPEED_STEPS) -> float:
    """The median duration of `steps` further steps: a burst of other work on the machine must not decide a training's length."""
    took = []
    for _ in range(steps):
        began = clock()
        loop.run(loop.done + 1)
        took.append(clock() - began)
    return statistics.median(took)
