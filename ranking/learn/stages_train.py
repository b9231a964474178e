"""The two losses that a ranker's own training does not have: the next token of texts, and preferences held to what was there.

Preference alignment works on the scores s = z_yes - z_no, which are the log-odds of the answer. Within one member's group, of
a candidate i that was chosen and j that was not, r being the scores of the stage before,

    - log sigmoid( beta * ((s_i - s_j) - (r_i - r_j)) )   +   anchor * KL(stage before || now), at every candidate

DPO (Rafailov et al. 2023) with log-odds as the implicit reward; pairs share their prefix, so both sides come out of one pass.
The anchor is what keeps probabilities probabilities: a pairwise loss alone knows no base rate.

Legend: n candidates of a step, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from ranking.learn.batches import GroupWriter
from ranking.learn.distill import Answers, forward_kl
from ranking.learn.examples import Pool
from ranking.learn.loop import Labels, LoopSettings, Trainer
from ranking.learn.positions import Places
from ranking.learn.stages_plan import Align, Instructions, Tasks, Text
from retrieval.learn.loop import Loop, Pace
from retrieval.llama import pad_rows

Rows = Sequence[Sequence[int]]


class Reader(Loop):
    """A run over texts: a causal LM learns the next token of rows that come round in an order that a seed fixes."""

    model: LlamaForCausalLM

    def __init__(
        self, model: LlamaForCausalLM, rows: Rows, pad: int, stage: Text, identity: Mapping[str, object], seed: int
    ) -> None:
        """`rows` token ids, each with two tokens at least, of which `pad` is none; `identity` as in `Loop`."""
        pace = Pace(learning_rate=stage.learning_rate, checkpoint_seconds=stage.checkpoint_seconds)
        super().__init__(model, pace, stage.steps, {**identity, "seed": seed, "rows": len(rows)})
        self.rows, self.pad, self.least, self.seed = rows, pad, stage.tokens, seed
        self.cursor = (0, 0)
        self._turn, self._order = -1, list[int]()

    def step_loss(self) -> tuple[Tensor, dict[str, float]]:
        """The mean surprise of the next rows' tokens."""
        return text_loss(self.model, [self.rows[row] for row in self._next()], self.pad), {}

    def _next(self) -> list[int]:
        """The rows of a step: at least `least` tokens."""
        turn, place = self.cursor
        chosen, size = list[int](), 0
        while size < self.least:
            if place >= len(self.rows):
                turn, place = turn + 1, 0
            if turn != self._turn:
                self._turn, self._order = turn, np.random.default_rng([self.seed, 13, turn]).permutation(len(self.rows)).tolist()
            chosen.append(self._order[place])
            size, place = size + len(self.rows[chosen[-1]]), place + 1
        self.cursor = (turn, place)
        return chosen

    def state(self) -> dict[str, Any]:
        """The place in the order."""
        return {"cursor": list(self.cursor)}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go to the place in the order that a checkpoint names."""
        self.cursor = (facts["cursor"][0], facts["cursor"][1])


def text_loss(model: LlamaForCausalLM, rows: Rows, pad: int) -> Tensor:
    """The mean negative log probability (nats) of each token after the first of its row; holds the logits [tokens, V] at once."""
    ids, lengths = (each.to(model.device) for each in pad_rows(rows, pad))
    there = torch.arange(ids.shape[1] - 1, device=ids.device)[None] < lengths[:, None] - 1
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][there]  # items are short beside prefixes
    return functional.cross_entropy(model.get_output_embeddings()(states).float(), ids[:, 1:][there])


class Aligner(Trainer):
    """A run whose loss is the one of this module; `kept` is what the stage before said of the same pools."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        writer: GroupWriter,
        pools: Mapping[str, Pool],
        labels: Labels,
        stage: Align,
        identity: Mapping[str, object],
        seed: int,
        kept: Answers,
        places: Places | None = None,
    ) -> None:
        """`identity` and `places` as in `ranking.learn.loop.Trainer`."""
        super().__init__(model, writer, pools, labels, stage.steps, loop_of(stage), identity, seed, None, places)
        self.stage, self.kept = stage, kept

    def step_loss(self) -> tuple[Tensor, dict[str, float]]:
        """Preferences and anchor of the next groups of the order; the curve tells them apart."""
        chosen = self.order.next()
        batch = self.writer.write(self.pools, chosen)
        logit, (before, _) = self.read(batch)[1], self.kept.read(chosen)
        before = before.to(logit.device)
        sizes = [len(one.items) for one in batch.requests]
        placed, label = self.placed(batch, logit), torch.from_numpy(batch.label).to(logit.device)
        self.note(batch, placed, label)
        wanted, gap = preference(placed, before, label, sizes, self.stage.beta), forward_kl(before, logit)
        return wanted + self.stage.anchor * gap, {"preference": float(wanted.detach()), "kl": float(gap.detach())}


def preference(logit: Tensor, before: Tensor, label: Tensor, sizes: Sequence[int], beta: float) -> Tensor:
    """The mean over groups (of `sizes` candidates) of their pairs' mean loss; 0 where no group has both answers."""
    found = []
    for gain, answer in zip((logit - before).split(list(sizes)), label.split(list(sizes))):
        margin = gain[answer > 0.5][:, None] - gain[answer <= 0.5][None]
        if margin.numel():
            found.append(functional.softplus(-beta * margin).mean())
    return torch.stack(found).mean() if found else 0.0 * logit.sum()


def loop_of(stage: Tasks | Instructions | Align) -> LoopSettings:
    """A stage over groups as the training loop wants it."""
    return LoopSettings(
        learning_rate=stage.learning_rate,
        candidates=stage.candidates,
        others=stage.others,
        temperature=stage.temperature,
        checkpoint_seconds=stage.checkpoint_seconds,
    )
