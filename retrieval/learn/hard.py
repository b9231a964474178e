"""Mined hard negatives: what the model of some steps ago would have shown a member."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from retrieval.encoder import Encoder, Pooling
from retrieval.learn.batches import Batch, Sampler
from retrieval.learn.timeline import Ints


@dataclass(frozen=True)
class Miner:
    """The best items of an earlier state of the model, by its vectors of the whole catalogue.

    `table` float32 [N, D]: the catalogue as that state read it with the numbers of the last day (zero before the first
    refresh). What is chosen is encoded anew, with the numbers of the batch's day.
    """

    sampler: Sampler
    table: torch.Tensor

    @classmethod
    def of(cls, sampler: Sampler, model: PreTrainedModel) -> Miner:
        """A miner that knows nothing yet."""
        return cls(sampler, torch.zeros(len(sampler.catalogue), model.config.hidden_size, device=model.device))

    def refresh(self, model: PreTrainedModel, pooling: Pooling) -> torch.Tensor:
        """Reads the catalogue with the weights of this moment; returns the table, changed in place."""
        reader = Encoder(model, self.sampler.writer, "", {"pooling": pooling})
        self.table.copy_(torch.from_numpy(reader.embed(self.sampler.catalogue)))
        model.train()
        return self.table

    def choose(self, batch: Batch, states: torch.Tensor, step: int) -> Ints:
        """Item rows int64 [P, n], -1 where there is none: drawn from the `mine_window` places after the first `mine_skip`.

        The first places are skipped because the best of what was not engaged is often what would have been. Only items that
        were there on the batch's day, and none that the member engages with.
        """
        settings, timeline = self.sampler.settings, self.sampler.timeline
        chosen = np.full((len(batch.target), settings.hard), -1, np.int64)
        if not self.table.any():
            return chosen
        scores = states @ self.table.T
        scores[:, torch.from_numpy(~self.sampler.there(batch.day)).to(scores.device)] = -torch.inf
        for row, who in enumerate(timeline.member[batch.target].tolist()):
            scores[row, torch.from_numpy(timeline.item[timeline.start[who] : timeline.start[who + 1]])] = -torch.inf
        depth = min(settings.mine_skip + settings.mine_window, scores.shape[1])
        best = scores.topk(depth, 1)
        place, known = best.indices.cpu().numpy(), torch.isfinite(best.values).cpu().numpy()
        rng = np.random.default_rng([self.sampler.seed, step, 5])
        for row in range(len(chosen)):
            pool = place[row, settings.mine_skip :][known[row, settings.mine_skip :]]
            taken = rng.choice(pool, min(settings.hard, len(pool)), replace=False)
            chosen[row, : len(taken)] = taken
        return chosen
