"""One step of the dual encoder: a batch of members and items in, the InfoNCE between them out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from retrieval.encoder import length_batches
from retrieval.learn.batches import Batch, Sampler
from retrieval.learn.loop import Loop, Pace
from retrieval.learn.loss import info_nce
from retrieval.llama import pad_rows

FORWARD_TOKENS = 4_096
"""Padded tokens of one forward pass; shorter rows go together, so little of it is padding."""
MAX_SCALE = 100.0


@dataclass(frozen=True)
class LoopSettings(Pace):
    """How the encoder's weights move. `first_scale`: one over the temperature at the start; it is learned from there."""

    learning_rate: float = 2e-3
    first_scale: float = 15.0


class Trainer(Loop):
    """One run of a trunk and its temperature over a sampler's batches."""

    model: PreTrainedModel
    settings: LoopSettings

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: Sampler,
        steps: int,
        settings: LoopSettings,
        identity: Mapping[str, object],
    ) -> None:
        self.sampler = sampler
        self.log_scale = nn.Parameter(torch.tensor(np.log(settings.first_scale), dtype=torch.float32))
        super().__init__(model, settings, steps, identity, {"log_scale": self.log_scale})

    def again(self, steps: int, learning_rate: float) -> Trainer:
        """Another run at step 0 over the same batches, from a copy of the weights that this one has now."""
        settings = replace(self.settings, learning_rate=learning_rate)
        return Trainer(copy.deepcopy(self.model), self.sampler, steps, settings, self.identity)

    def step_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The InfoNCE of batch number `done`, and the scale that it was taken at."""
        with torch.no_grad():
            self.log_scale.clamp_(max=float(np.log(MAX_SCALE)))
        return self.loss(self.sampler.batch(self.done)), {"scale": float(self.log_scale.detach().exp())}

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


def _in_order(parts: Sequence[torch.Tensor], places: Sequence[np.ndarray]) -> torch.Tensor:
    """Concatenated parts, each row back at its place."""
    return torch.cat(list(parts))[torch.from_numpy(np.argsort(np.concatenate(list(places)), kind="stable"))]
