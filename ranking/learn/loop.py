"""One run of the ranker: packed groups in, the loss at the answer positions out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from ranking.learn.attention import training_mixer
from ranking.learn.batches import Batch, GroupWriter, Order
from ranking.learn.examples import Pool
from ranking.learn.positions import WORDS_FIRST, Places, Positions
from ranking.learn.variety import Variety
from ranking.prefill.llama import Layers
from ranking.prefill.plan import plan
from ranking.prefill.request import Limits
from retrieval.learn.loop import Loop, Pace

Labels = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class LoopSettings(Pace):
    """How weights move, `candidates` per step, and `others` groups of each further task for one group of the first.

    A mixing `temperature` takes the place of `others`; see `ranking.learn.batches.Order`.
    """

    learning_rate: float = 3e-4
    candidates: int = 80
    others: float = 0.05
    temperature: float | None = None


class Trainer(Loop):
    """One run: a causal LM, an order of groups, an optimizer and the number of steps done.

    The forward pass is the serving one (`ranking.prefill`), with a gradient: no padding, no mask, and the last layer only
    where an answer is read.
    """

    model: LlamaForCausalLM
    settings: LoopSettings

    def __init__(
        self,
        model: LlamaForCausalLM,
        writer: GroupWriter,
        pools: Mapping[str, Pool],
        labels: Labels,
        steps: int,
        settings: LoopSettings,
        identity: Mapping[str, object],
        seed: int,
        variety: Variety | None = None,
        places: Places | None = None,
    ) -> None:
        """`labels` task -> (positive, negative) token ids; `pools` the groups to learn from, the main task first; `identity`
        as in `retrieval.learn.loop.Loop`; without a `variety` every group is put as it is served, without `places` positions
        are not taken out."""
        own = {"seed": seed, "groups": [*map(len, pools.values())]}
        super().__init__(model, settings, steps, {**identity, **own})
        self.positions = None if places is None else Positions(places, model.device)
        self.writer, self.pools, self.labels, self.seed, self.variety = writer, pools, labels, seed, variety
        self.order = Order(pools, settings.others, settings.candidates, seed, settings.temperature)
        self.tokens = 0
        self._layers = layers_of(model)

    def again(self, steps: int, learning_rate: float) -> Trainer:
        """A run of another length and rate over the same groups, from a copy of the weights as they are."""
        settings = replace(self.settings, learning_rate=learning_rate)
        model, places = copy.deepcopy(self.model), None if self.positions is None else self.positions.places
        parts = (self.writer, self.pools, self.labels)
        found = Trainer(model, *parts, steps, settings, self.identity, self.seed, self.variety, places)
        if self.positions is not None and found.positions is not None:
            found.positions.restore(self.positions.state())
        return found

    def step_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of the next groups of the order."""
        chosen = self.order.next()
        said = None if self.variety is None else self.variety.of(self.pools, chosen, self.done)
        return self.loss(self.writer.write(self.pools, chosen, said)), {}

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean log-loss of the batch's answers, from the logits of the two answer words in float32."""
        label, logits = torch.from_numpy(batch.label).to(self.model.device), self.placed(batch, self.read(batch)[1])
        if self.variety is not None and self.variety.corrections:
            added = [self.variety.corrections.get(task, 0.0) for task in batch.tasks]
            each = np.where(batch.event >= 0, np.repeat(added, [len(one.items) for one in batch.requests]), 0.0)
            logits = logits + torch.from_numpy(each).to(logits)
        self.note(batch, logits, label)
        return functional.binary_cross_entropy_with_logits(logits, label)

    def note(self, batch: Batch, logits: torch.Tensor, label: torch.Tensor) -> None:
        """What the answers [n] say of places is known from the next step on, once the words had time to learn."""
        if self.positions is not None and self.done >= WORDS_FIRST * self.steps:
            self.positions.learn(batch, logits, label)

    def placed(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        """The logits [n] with what the places of the candidates add."""
        return logits if self.positions is None else logits + self.positions.added(batch)

    def read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The `answers` of a batch, whose tokens count as read."""
        self.tokens += sum(len(one.prefix) + sum(map(len, one.items)) for one in batch.requests)
        return answers(self._layers, self.labels, batch)

    def state(self) -> dict[str, Any]:
        """The place in the order, the tokens read, and what is known of positions."""
        places = {} if self.positions is None else {"positions": self.positions.state()}
        return {"cursor": list(self.order.cursor), "tokens": self.tokens, **places}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go to the place in the order that a checkpoint names."""
        if self.positions is not None:
            self.positions.restore(facts["positions"])
        self.tokens, self.order.cursor = facts["tokens"], (facts["cursor"][0], facts["cursor"][1])


def answers(layers: Layers, labels: Labels, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states [n, D] where the answers are read, and z_yes - z_no float32 [n], of a batch's candidates."""
    planned = plan(batch.requests, Limits(max_tokens=1 << 62), hoist=False)
    (chunk,) = planned.chunks
    where = np.empty(planned.unique_items, np.int64)
    where[chunk.unique] = np.arange(len(chunk.unique))
    head = layers.model.get_output_embeddings().weight
    rows = torch.from_numpy(np.concatenate([where[rows] for rows in planned.fan_out])).to(head.device)
    state = layers.read(chunk, {}).float()[rows]
    pairs = torch.tensor([labels[task] for task in batch.tasks], device=head.device)
    direction = head[pairs[:, 0]].float() - head[pairs[:, 1]].float()
    sizes = torch.tensor([len(request.items) for request in batch.requests], device=head.device)
    return state, (state * direction.repeat_interleave(sizes, 0)).sum(-1)


def layers_of(model: LlamaForCausalLM) -> Layers:
    """The differentiable layer loop of a model."""
    return Layers(model, training_mixer(model.get_input_embeddings().weight.device.type))
