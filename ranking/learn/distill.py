"""A student learns what its teacher says: the teacher reads the training groups once, its answers are kept, students read them.

The loss at each score position (nowhere else is anything asked) is

    kl * T^2 * KL(teacher || student at temperature T)  +  label * log-loss of the answer  +  hidden * (1 - cosine)

where the cosine is between the states after the final norm, the student's sent through a learned projection if it is narrower.
Forward KL over two answers depends on the difference of their logits alone (softmax cancels the rest), so four bytes for each
candidate are the whole answer of a teacher. Sources: Hinton et al. 2015 (T^2); arXiv 2502.14305 (forward KL and labels).

Legend: G groups, n candidates, D hidden dims.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from ranking.learn.batches import Choice, GroupWriter
from ranking.learn.examples import Pool
from ranking.learn.loop import Labels, LoopSettings, Trainer, answers, layers_of
from ranking.learn.positions import Places
from ranking.prefill.llama import Layers
from retrieval.learn.checkpoint import TrainingError, check_identity, write_json

SHARD = 512
"""Groups of one file of answers: what a killed teacher has to read again at most."""
GROUPS_PER_PASS = 16
IDENTITY = "identity.json"
LOGIT, HIDDEN = "logit", "hidden"

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Learning:
    """How long and from what a student learns; the weights of the three losses, and the temperature of the first."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: int = 500
    learning_rate: float = 1e-3
    candidates: int = 80
    kl: float = 1.0
    label: float = 0.5
    hidden: float = 0.1
    temperature: float = 1.0
    checkpoint_seconds: float = 120.0

    @property
    def loop(self) -> LoopSettings:
        """The same as the training loop wants it."""
        return LoopSettings(
            learning_rate=self.learning_rate, candidates=self.candidates, checkpoint_seconds=self.checkpoint_seconds
        )

    @property
    def taught(self) -> bool:
        """Whether a teacher is asked at all."""
        return self.kl > 0 or self.hidden > 0


class Answers:
    """What a teacher said about every candidate of some pools, on disk: logits float32, and states float16 if asked for."""

    def __init__(self, folder: Path, pools: Mapping[str, Pool], identity: Mapping[str, object], *, states: bool) -> None:
        """`identity` names teacher and data. Raises TrainingError if the folder holds the answers of others."""
        self.folder, self.pools, self.states = folder, pools, states
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / IDENTITY
        wanted = {**identity, "states": states, "candidates": {name: len(pool.label) for name, pool in pools.items()}}
        if path.is_file():
            check_identity(path, json.loads(path.read_text(encoding="utf-8")), wanted)
        else:
            write_json(path, wanted)

    def fill(self, teacher: LlamaForCausalLM, labels: Labels, writer: GroupWriter, tell: Tell) -> None:
        """Every answer is on disk; what a killed run left is not asked again."""
        layers = layers_of(teacher.eval())
        shards = [(name, first) for name, pool in self.pools.items() for first in range(0, len(pool), SHARD)]
        for number, (name, first) in enumerate(shards):
            if not self._path(name, first).is_file():
                self._write(layers, labels, writer, name, first)
            tell(number + 1, len(shards))

    def read(self, chosen: Sequence[Choice]) -> tuple[Tensor, Tensor | None]:
        """Logits float32 [n] and states float32 [n, D] (None: not kept) of the chosen groups' candidates.

        Raises TrainingError if a file is missing or damaged.
        """
        found = [self._group(name, group) for name, group in chosen]
        states = [state for _, state in found if state is not None]
        return torch.cat([logit for logit, _ in found]), torch.cat(states).float() if states else None

    def _group(self, name: str, group: int) -> tuple[Tensor, Tensor | None]:
        first = group // SHARD * SHARD
        start = self.pools[name].start
        rows = slice(int(start[group] - start[first]), int(start[group + 1] - start[first]))
        path = self._path(name, first)
        try:
            with safe_open(path, framework="pt") as file:
                logit = file.get_slice(LOGIT)[rows]
                state = file.get_slice(HIDDEN)[rows] if self.states else None
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path}: the teacher's answers cannot be read ({error}); remove it and start again") from error
        if len(logit) != rows.stop - rows.start:
            raise TrainingError(f"{path}: holds fewer answers than the groups have candidates; remove it and start again")
        return logit, state

    def _write(self, layers: Layers, labels: Labels, writer: GroupWriter, name: str, first: int) -> None:
        last = min(first + SHARD, len(self.pools[name]))
        logits, states = [], []
        for begin in range(first, last, GROUPS_PER_PASS):
            chosen = [(name, group) for group in range(begin, min(begin + GROUPS_PER_PASS, last))]
            with torch.no_grad():
                state, logit = answers(layers, labels, writer.write(self.pools, chosen))
            logits.append(logit.cpu())
            states.append(state.half().cpu())
        held = {LOGIT: torch.cat(logits)} | ({HIDDEN: torch.cat(states)} if self.states else {})
        path = self._path(name, first)
        save_file(held, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _path(self, name: str, first: int) -> Path:
        return self.folder / f"{list(self.pools).index(name)}-{first:07d}.safetensors"


class Distiller(Trainer):
    """A training run whose loss asks a teacher's kept answers (None: labels alone)."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        writer: GroupWriter,
        pools: Mapping[str, Pool],
        labels: Labels,
        learning: Learning,
        identity: Mapping[str, object],
        seed: int,
        kept: Answers | None,
        places: Places | None = None,
    ) -> None:
        """`identity` and `places` as in `ranking.learn.loop.Trainer`. Raises TrainingError if the losses need answers that are
        not there."""
        if (learning.taught and kept is None) or (learning.hidden > 0 and kept is not None and not kept.states):
            raise TrainingError("the losses ask for a teacher's answers or states, and none are kept; set kl and hidden to 0")
        whole = {**identity, "learning": asdict(learning)}
        super().__init__(model, writer, pools, labels, learning.steps, learning.loop, whole, seed, None, places)
        self.learning, self.kept = learning, kept
        self._projection: nn.Parameter | None = None
        if kept is not None and learning.hidden > 0:
            self._project(_width(kept), seed)

    def _project(self, width: int, seed: int) -> None:
        own = self.model.config.hidden_size
        if own == width:
            return
        draw = torch.empty(own, width)
        nn.init.orthogonal_(draw, generator=torch.Generator().manual_seed(seed))
        self._projection = nn.Parameter(draw.to(self.model.device))
        self.extra["projection"] = self._projection
        self.optimizer.add_param_group({"params": [self._projection]})

    def step_loss(self) -> tuple[Tensor, dict[str, float]]:
        """The three losses of the next groups of the order, weighted; the curve tells the first and the last apart."""
        chosen = self.order.next()
        batch = self.writer.write(self.pools, chosen)
        state, logit = self.read(batch)
        wanted = self.learning
        label = torch.from_numpy(batch.label).to(logit.device)
        placed = self.placed(batch, logit)
        self.note(batch, placed, label)
        loss = wanted.label * functional.binary_cross_entropy_with_logits(placed, label)
        if self.kept is None or not wanted.taught:
            return loss, {}
        said, shown = self.kept.read(chosen)
        gap = forward_kl(said.to(logit.device), logit, wanted.temperature)
        loss = loss + wanted.kl * gap
        measures = {"kl": float(gap.detach())}
        if shown is not None and wanted.hidden > 0:
            own = state if self._projection is None else state @ self._projection
            apart = (1 - functional.cosine_similarity(own, shown.to(own.device), dim=-1)).mean()
            loss, measures["hidden"] = loss + wanted.hidden * apart, float(apart.detach())
        return loss, measures


def _width(kept: Answers) -> int:
    """Dims of the teacher's states."""
    _, states = kept.read([(next(iter(kept.pools)), 0)])
    assert states is not None
    return states.shape[1]


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean over [n] of T^2 * KL(teacher || student) of two-answer distributions given as logit differences; 0 if equal."""
    said = teacher / temperature
    surprise = functional.binary_cross_entropy_with_logits(student / temperature, said.sigmoid())
    own = functional.binary_cross_entropy_with_logits(said, said.sigmoid())
    return temperature**2 * (surprise - own)
