"""One step of the dual encoder: a batch of members and items in, the loss between them out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from retrieval.encoder import Pooling, length_batches
from retrieval.learn.batches import Batch, Sampler
from retrieval.learn.hard import Miner
from retrieval.learn.loop import Loop, Pace
from retrieval.learn.loss import Loss, Match, objective
from retrieval.learn.ranks import Ranks
from retrieval.learn.sharded import Passes, Shards
from retrieval.learn.timeline import Ints
from retrieval.llama import pad_rows

MAX_SCALE = 100.0
Precision = Literal["float32", "bf16"]
Pool = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states [B, T, D], row [n] and length [n] of what is asked for: vectors [n, D], not yet of unit length."""


@dataclass(frozen=True)
class LoopSettings(Pace):
    """How the encoder's weights move.

    `first_scale`: one over the temperature at the start; it is learned from there. `near` and `matryoshka` as `loss.objective`
    takes them. `forward_tokens`: padded tokens of one forward pass; shorter rows go together, so little of it is padding.
    `cached`: a pass keeps its vectors only and is done again when the gradient comes back (GradCache, Gao et al. 2021): the
    memory of one pass for any batch, the same gradients. `recompute`: the same for each layer within a pass (gradient
    checkpointing). `precision`: bf16 runs the trunk under autocast; weights, pooling and loss stay float32. `shard`: each of
    several processes keeps a part of weights, gradients and optimizer state (`retrieval.learn.sharded`).
    """

    learning_rate: float = 2e-3
    first_scale: float = 15.0
    loss: Loss = "infonce"
    near: float | None = None
    matryoshka: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    forward_tokens: int = 4_096
    cached: bool = False
    recompute: bool = False
    precision: Precision = "float32"
    shard: bool = False


class Trainer(Loop):
    """One run of a trunk and its temperature over a sampler's batches, alone or as one of several processes (`ranks`)."""

    model: PreTrainedModel
    settings: LoopSettings

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: Sampler,
        steps: int,
        settings: LoopSettings,
        identity: Mapping[str, object],
        device: str,
    ) -> None:
        """Moves the trunk to `device`, whole or this process's part of it."""
        self.sampler, self.ranks, self.device = sampler, Ranks.here(), device
        self.log_scale = nn.Parameter(torch.tensor(np.log(settings.first_scale), dtype=torch.float32, device=device))
        if settings.recompute:
            with warnings.catch_warnings():  # newer releases of the library have another name for it, older ones only this
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        self.bf16, self.passes = settings.precision == "bf16", Passes(settings.cached)
        self.shards = Shards.of(model, device, bf16=self.bf16) if settings.shard else None
        if self.shards is None:
            model.to(torch.device(device))
        self.miner = Miner.of(sampler, model) if sampler.settings.mines else None
        super().__init__(model, settings, steps, identity, {"log_scale": self.log_scale})

    def again(self, steps: int, learning_rate: float) -> Trainer:
        """Another run at step 0 over the same batches, from a copy of the weights that this one has now."""
        settings = replace(self.settings, learning_rate=learning_rate)
        model = self.whole() if self.shards else copy.deepcopy(self.model)
        return Trainer(model, self.sampler, steps, settings, self.identity, self.device)

    def whole(self, *, keep: bool = True) -> PreTrainedModel:
        """The trunk, or a whole copy of one that is spread over processes; then all must ask, and those that `keep` get it."""
        return self.shards.whole(self.model, keep=keep) if self.shards else self.model

    def step_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of batch number `done`, and the scale that it was taken at."""
        with torch.no_grad():
            self.log_scale.clamp_(max=float(np.log(MAX_SCALE)))
        if self.miner is not None and self.done and self.done % self.sampler.settings.mine_every == 0:
            self.ranks.same(self.miner.refresh(self.model, self.settings.pooling))
        return self.loss(self.sampler.batch(self.done)), {"scale": float(self.log_scale.detach().exp())}

    def settle(self) -> None:
        """Sums the trunk's gradients over processes. The temperature's is whole in each; its mean takes out rounding."""
        self.passes.back()
        if self.shards is None:
            self.ranks.sum_gradients(self.model.parameters())
        self.ranks.sum_gradients([self.log_scale])
        if self.ranks.world > 1 and self.log_scale.grad is not None:
            self.log_scale.grad /= self.ranks.world

    def loss(self, batch: Batch) -> torch.Tensor:
        """The batch's loss. Mined negatives, if any, are chosen by the states of this very pass."""
        states = self._member_states(batch)
        if self.miner is not None:
            chosen = self.ranks.same(torch.from_numpy(self.miner.choose(batch, states.detach(), self.done)))
            batch = self.sampler.with_hard(batch, chosen.numpy())
        items = self._item_vectors(batch)
        there = states.device
        match = Match(*(torch.from_numpy(part).to(there) for part in (batch.positive, batch.log_q, batch.hidden)))
        settings = self.settings
        return objective(states, items, match, self.log_scale.exp(), settings.loss, settings.near, settings.matryoshka)

    def _member_states(self, batch: Batch) -> torch.Tensor:
        """Unit vectors [P, D]: for each target the pool over the tokens of its member row up to its prefix.

        One causal pass serves every target of a member: a state at a prefix is exactly what a shorter row would give.
        """
        return self._vectors(batch.member_rows, batch.owner, batch.prefix, PREFIX_POOLS[self.settings.pooling])

    def _item_vectors(self, batch: Batch) -> torch.Tensor:
        ends = np.array([len(row) for row in batch.item_rows], np.int64)
        return self._vectors(batch.item_rows, None, ends, WHOLE_POOLS[self.settings.pooling])

    def _vectors(self, rows: Sequence[Sequence[int]], owner: Ints | None, ends: Ints, pool: Pool) -> torch.Tensor:
        """Unit vectors [P, D] of the first `ends` tokens of the rows `owner` (None: each row once), read by all processes.

        Over a trunk that is spread, a process with fewer passes than another makes up for it by passes that nothing is read from.
        """
        lengths = np.array([len(row) for row in rows], np.int64)
        parts: list[torch.Tensor] = []
        places: list[Ints] = []
        sizes: list[int] = []
        shares = self.ranks.shares(lengths)
        chunks = [
            [share[part] for part in length_batches(lengths[share].tolist(), self.settings.forward_tokens)] for share in shares
        ]
        for rank, planned in enumerate(chunks):
            before = len(places)
            for held in planned:
                mine = held if owner is None else np.flatnonzero(np.isin(owner, held))
                places.append(mine)
                if rank == self.ranks.rank:
                    at = _places_of(mine if owner is None else owner[mine], held)
                    parts.append(self._pass([rows[row] for row in held], at, torch.from_numpy(ends[mine]), pool))
            sizes.append(sum(map(len, places[before:])))
        if self.shards is not None:
            none = torch.zeros(0, dtype=torch.int64)
            missing = max(map(len, chunks)) - len(parts)
            parts += [self._pass([[self.sampler.writer.tokens.pad]], none, none, pool) for _ in range(missing)]
        own = torch.cat(parts) if parts else torch.zeros(0, self.model.config.hidden_size, device=self.model.device)
        return functional.normalize(_in_order(self.ranks.gather(own, sizes), places), dim=-1)

    def _pass(self, rows: Sequence[Sequence[int]], at: torch.Tensor, ends: torch.Tensor, pool: Pool) -> torch.Tensor:
        """One forward pass, pooled; `cached` forgets it and does it again in the backward pass (a spread trunk's in `settle`)."""
        there = self.model.device

        def read() -> torch.Tensor:
            return pool(self._hidden(rows), at.to(there), ends.to(there))

        if self.shards is not None:
            return self.passes.make(read)
        return checkpoint(read, use_reentrant=False) if self.settings.cached else read()

    def _hidden(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        ids, _ = pad_rows(rows, self.sampler.writer.tokens.pad)
        there = self.model.device
        with torch.autocast(there.type, torch.bfloat16, enabled=self.bf16 and self.shards is None):
            return self.model(input_ids=ids.to(there), use_cache=False).last_hidden_state.float()

    def due(self, seconds: float) -> bool:
        """By the first process's clock where all have a part in the checkpoint."""
        due = super().due(seconds)
        return bool(self.ranks.agreed(due)) if self.shards else due

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super()._weights()
        if self.miner is not None:
            yield "mined_table", self.miner.table


def _prefix_means(hidden: torch.Tensor, at: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return hidden.cumsum(1)[at, ends - 1] / ends[:, None]


def _whole_means(hidden: torch.Tensor, _at: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each row once, in the order of the rows."""
    real = torch.arange(hidden.shape[1], device=hidden.device)[None, :] < ends[:, None]
    return (hidden * real[..., None]).sum(1) / ends[:, None]


def _states_at_end(hidden: torch.Tensor, at: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return hidden[at, ends - 1]


def _prefix_means_and_ends(hidden: torch.Tensor, at: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return _prefix_means(hidden, at, ends) + _states_at_end(hidden, at, ends)


def _whole_means_and_ends(hidden: torch.Tensor, at: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return _whole_means(hidden, at, ends) + _states_at_end(hidden, at, ends)


PREFIX_POOLS: dict[Pooling, Pool] = {"mean": _prefix_means, "last": _states_at_end, "mean+last": _prefix_means_and_ends}
WHOLE_POOLS: dict[Pooling, Pool] = {"mean": _whole_means, "last": _states_at_end, "mean+last": _whole_means_and_ends}


def _places_of(wanted: Ints, held: Ints) -> torch.Tensor:
    """Where each wanted row stands among those held (each of them is there)."""
    order = np.argsort(held, kind="stable")
    return torch.from_numpy(order[np.searchsorted(held[order], wanted)])


def _in_order(parts: torch.Tensor, places: Sequence[Ints]) -> torch.Tensor:
    """The rows, each back at its place."""
    back = np.argsort(np.concatenate(list(places)), kind="stable")
    return parts[torch.from_numpy(back).to(parts.device)]
