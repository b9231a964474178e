"""The training loop of the dual encoder: batches in, weights out, a curve and a checkpoint beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from retrieval.encoder import length_batches
from retrieval.learn.batches import Batch, Sampler
from retrieval.learn.checkpoint import TrainingError, load_state, save_state, weight_groups
from retrieval.learn.loss import info_nce
from retrieval.llama import pad_rows

FORWARD_TOKENS = 4_096
"""Padded tokens of one forward pass; shorter rows go together, so little of it is padding."""
MAX_SCALE = 100.0


@dataclass(frozen=True)
class LoopSettings:
    """How weights move. Learning rate: linear warm-up over `warmup` of the steps, then linear to zero."""

    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    first_scale: float = 15.0
    checkpoint_seconds: float = 120.0


Progress = Callable[[int, int], None]


class Trainer:
    """One run: a trunk, a temperature, an optimizer and the number of steps done."""

    def __init__(self, model: PreTrainedModel, sampler: Sampler, steps: int, settings: LoopSettings) -> None:
        self.model, self.sampler, self.steps, self.settings = model, sampler, steps, settings
        self.log_scale = nn.Parameter(torch.tensor(np.log(settings.first_scale), dtype=torch.float32))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        groups = weight_groups([*trained, self.log_scale], settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.done = 0
        self.curve: list[dict[str, float]] = []

    def run(self, until: int, progress: Progress | None = None, checkpoint: Path | None = None) -> None:
        """Trains up to step `until`; with `checkpoint` a killed run goes on from that folder later."""
        self.model.train()
        saved = time.monotonic()
        while self.done < until:
            self._step()
            if progress is not None:
                progress(self.done, self.steps)
            if checkpoint is not None and time.monotonic() - saved > self.settings.checkpoint_seconds:
                self.save(checkpoint)
                saved = time.monotonic()

    def _step(self) -> None:
        rate = self.settings.learning_rate * schedule(self.done, self.steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.sampler.batch(self.done)
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss became {float(loss)} at step {self.done}; lower the learning rate ({rate:.2g})")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        with torch.no_grad():
            self.log_scale.clamp_(max=float(np.log(MAX_SCALE)))
        self.done += 1
        self.curve.append({"step": self.done, "loss": float(loss.detach()), "scale": float(self.log_scale.detach().exp())})

    def loss(self, batch: Batch) -> torch.Tensor:
        """The batch's InfoNCE."""
        states = self._member_states(batch)
        items = self._item_vectors(batch)
        return info_nce(
            states,
            items,
            torch.from_numpy(batch.positive),
            torch.from_numpy(batch.log_q),
            torch.from_numpy(batch.hidden),
            self.log_scale.exp(),
        )

    def _member_states(self, batch: Batch) -> torch.Tensor:
        """Unit vectors [P, D]: for each target the mean over the tokens of its member row up to its prefix.

        One causal pass serves every target of a member: a state at a prefix is exactly what a shorter row would give.
        """
        parts, places = [], []
        for chunk in length_batches([len(row) for row in batch.member_rows], FORWARD_TOKENS):
            hidden = self._hidden([batch.member_rows[row] for row in chunk])
            running = hidden.cumsum(1)
            place_in_chunk = {int(row): place for place, row in enumerate(chunk)}
            mine = np.flatnonzero(np.isin(batch.owner, chunk))
            rows = torch.tensor([place_in_chunk[int(row)] for row in batch.owner[mine]])
            prefix = torch.from_numpy(batch.prefix[mine])
            parts.append(running[rows, prefix - 1] / prefix[:, None])
            places.append(mine)
        return functional.normalize(_in_order(parts, places), dim=-1)

    def _item_vectors(self, batch: Batch) -> torch.Tensor:
        parts, places = [], []
        lengths = [len(row) for row in batch.item_rows]
        for chunk in length_batches(lengths, FORWARD_TOKENS):
            hidden = self._hidden([batch.item_rows[row] for row in chunk])
            length = torch.tensor([lengths[row] for row in chunk])
            real = torch.arange(hidden.shape[1])[None, :] < length[:, None]
            parts.append((hidden * real[..., None]).sum(1) / length[:, None])
            places.append(chunk)
        return functional.normalize(_in_order(parts, places), dim=-1)

    def _hidden(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        ids, _ = pad_rows(rows, self.sampler.writer.tokens.pad)
        return self.model(input_ids=ids, use_cache=False).last_hidden_state.float()

    def save(self, folder: Path) -> None:
        """Writes weights, optimizer state and position, whole or not at all."""
        facts = {"step": self.done, "plan": self._plan(), "curve": self.curve}
        save_state(folder, self._weights(), self.optimizer, facts)

    def resume(self, folder: Path) -> bool:
        """Goes on where a checkpoint of the same plan stopped; False if there is none. Raises TrainingError on another plan."""
        facts = load_state(folder, self._weights(), self.optimizer, self._plan())
        if facts is None:
            return False
        self.done, self.curve = facts["step"], facts["curve"]
        return True

    def _plan(self) -> dict[str, object]:
        return {"steps": self.steps, "seed": self.sampler.seed, "settings": asdict(self.settings)}

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield "log_scale", self.log_scale


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the full learning rate at a step: a function of the step alone, so that a rerun takes the same path."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))


def _in_order(parts: Sequence[torch.Tensor], places: Sequence[np.ndarray]) -> torch.Tensor:
    """Concatenated parts, each row back at its place."""
    return torch.cat(list(parts))[torch.from_numpy(np.argsort(np.concatenate(list(places)), kind="stable"))]
