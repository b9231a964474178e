"""The training loop of the ranker: packed groups in, weights out, loss at the answer positions only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from ranking.learn.attention import training_mixer
from ranking.learn.batches import Batch, GroupWriter, Order
from ranking.learn.examples import Pool
from ranking.prefill.llama import Layers
from ranking.prefill.plan import Limits, plan
from retrieval.learn.checkpoint import TrainingError, load_state, save_state, weight_groups
from retrieval.learn.train import schedule

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoopSettings:
    """How weights move: AdamW, linear warm-up over `warmup` of the steps, then linear to zero. `candidates` per step;
    `others` groups of each further task for one group of the first."""

    learning_rate: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    candidates: int = 80
    others: float = 0.05
    checkpoint_seconds: float = 120.0


class Trainer:
    """One run: a causal LM, an order of groups, an optimizer and the number of steps done.

    The forward pass is the serving one (`ranking.prefill`), with a gradient: no padding, no mask, and the last layer only
    where an answer is read.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        writer: GroupWriter,
        pools: Mapping[str, Pool],
        labels: Mapping[str, tuple[int, int]],
        steps: int,
        settings: LoopSettings,
        seed: int,
    ) -> None:
        """`labels` task -> (positive, negative) token ids; `pools` the groups to learn from, the main task first."""
        self.model, self.writer, self.pools, self.labels = model, writer, pools, labels
        self.steps, self.settings, self.seed = steps, settings, seed
        self.order = Order(pools, settings.others, settings.candidates, seed)
        self._layers = Layers(model, training_mixer(model.get_input_embeddings().weight.device.type))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        groups = weight_groups(trained, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.done = 0
        self.tokens = 0
        self.curve: list[dict[str, float]] = []

    def run(self, until: int, progress: Progress | None = None, checkpoint: Path | None = None) -> None:
        """Train up to step `until`; with `checkpoint` a killed run goes on from that folder later."""
        self.model.train()
        saved = time.monotonic()
        while self.done < until:
            self._step()
            if progress is not None:
                progress(self.done, self.steps)
            if checkpoint is not None and time.monotonic() - saved > self.settings.checkpoint_seconds:
                self.save(checkpoint)
                saved = time.monotonic()
        self.model.eval()

    def _step(self) -> None:
        rate = self.settings.learning_rate * schedule(self.done, self.steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.writer.write(self.pools, self.order.next()))
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss became {float(loss)} at step {self.done}; lower the learning rate ({rate:.2g})")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.done += 1
        self.curve.append({"step": self.done, "loss": float(loss.detach())})

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean log-loss of the batch's answers, from the logits of the two answer words in float32."""
        label = torch.from_numpy(batch.label).to(self.model.device)
        return functional.binary_cross_entropy_with_logits(self.scores(batch), label)

    def scores(self, batch: Batch) -> torch.Tensor:
        """z_yes - z_no float32 [n] of the batch's candidates."""
        planned = plan(batch.requests, Limits(max_tokens=1 << 62), hoist=False)
        (chunk,) = planned.chunks
        self.tokens += len(chunk.tokens)
        where = np.empty(planned.unique_items, np.int64)
        where[chunk.unique] = np.arange(len(chunk.unique))
        rows = torch.from_numpy(np.concatenate([where[rows] for rows in planned.fan_out])).to(self.model.device)
        hidden = self._layers.read(chunk, {}).float()[rows]
        head = self.model.get_output_embeddings().weight
        pairs = torch.tensor([self.labels[task] for task in batch.tasks], device=head.device)
        direction = head[pairs[:, 0]].float() - head[pairs[:, 1]].float()
        sizes = torch.tensor([len(request.items) for request in batch.requests], device=head.device)
        return (hidden * direction.repeat_interleave(sizes, 0)).sum(-1)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer state and position, whole or not at all."""
        facts = {
            "step": self.done,
            "cursor": list(self.order.cursor),
            "tokens": self.tokens,
            "plan": self._plan(),
            "curve": self.curve,
        }
        save_state(folder, self.model.named_parameters(), self.optimizer, facts)

    def resume(self, folder: Path) -> bool:
        """Go on where a checkpoint of the same plan stopped; False if there is none. Raises TrainingError on another plan."""
        facts = load_state(folder, self.model.named_parameters(), self.optimizer, self._plan())
        if facts is None:
            return False
        self.done, self.tokens, self.curve = facts["step"], facts["tokens"], facts["curve"]
        self.order.cursor = (facts["cursor"][0], facts["cursor"][1])
        return True

    def _plan(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "groups": [*map(len, self.pools.values())],
        }
