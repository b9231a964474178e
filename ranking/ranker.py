"""The ranker: a folder that is complete, and the object that turns a member and candidates into probabilities.

A folder holds the weights, the tokenizer, the quantizer, `ranker.json` (template versions, tasks with their label tokens,
budgets, layout, examples, calibrators, the encoder it goes with) and, if numbers join the words, `fusion.json`
(`ranking.fusion`). One fingerprint covers all of it; nothing is overridden at load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import LlamaForCausalLM

from index.errors import BrewlineError
from ranking.calibrate import Calibrator
from ranking.fusion import FUSION_FILE, Head
from ranking.fusion_features import Asked, features
from ranking.prefill.engine import Engine
from ranking.prefill.load import Arithmetic, load_model
from ranking.prefill.request import Limits, Request
from ranking.prompts import RANK_TEMPLATE, LabelWordError, RankBudgets, RankLayout, RankPrompts, label_id
from ranking.shots import Shots, shots_facts, shots_of
from ranking.tasks import LABEL, Task, task_named
from retrieval.data.schema import Item, MemberView
from retrieval.features import Quantizer
from retrieval.fingerprint import folder_fingerprint
from retrieval.llama import save_llama
from retrieval.prompts import TEMPLATE_VERSION
from retrieval.tokens import Tokens

FORMAT = 1
FACTS, READS_WISHES = "ranker.json", "reads_wishes"
QUANTIZER = "quantizer.json"
FINGERPRINTED = (FACTS, QUANTIZER, "tokenizer.json", "config.json", "model.safetensors")

Floats = npt.NDArray[np.float32]


class RankerError(BrewlineError):
    """A folder is not a complete ranker of this version, or its parts do not belong together."""


@dataclass(frozen=True)
class RankerFacts:
    """What `ranker.json` says. `labels` task -> (positive, negative) token ids; `encoder` is a fingerprint or None;
    `training` says how the weights came to be, without times, so that the same training gives the same bytes."""

    tasks: Mapping[str, Task]
    labels: Mapping[str, tuple[int, int]]
    budgets: RankBudgets
    calibrators: Mapping[str, Calibrator]
    encoder: str | None
    training: Mapping[str, Any]
    layout: RankLayout = field(default_factory=RankLayout)
    shots: Shots = field(default_factory=dict)

    @property
    def reads_wishes(self) -> bool:
        """Whether the weights were taught what a member's own words ask for, or come from a checkpoint that can read. To others
        such words are noise that turns the order of everything (docs/tasks.md)."""
        return bool(self.training.get(READS_WISHES, True))


class Ranker:
    """Probabilities of a task's positive answer for candidates before one member. Threads that call it wait for each other."""

    def __init__(
        self, prompts: RankPrompts, facts: RankerFacts, fingerprint: str, engine: Engine, head: Head | None = None
    ) -> None:
        self.prompts, self.facts, self.fingerprint, self.engine, self.head = prompts, facts, fingerprint, engine, head

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        backend: str | None = None,
        max_tokens: int = 8192,
        arithmetic: Arithmetic = "float32",
    ) -> Ranker:
        """The ranker of a complete folder; `max_tokens` bounds one forward pass.

        Raises RankerError, LabelWordError, MissingPart, TokenizerError, QuantizerError, CheckpointError, UnsupportedModel,
        BackendMissing (a named attention backend that cannot run), DeviceMissing, Int8Missing, Float8Missing, each saying what
        was seen and what was expected.
        """
        facts = read_facts(folder)
        fingerprint = folder_fingerprint(folder, _parts(folder))
        tokens = Tokens.load(folder)
        prompts = RankPrompts(tokens, Quantizer.load(folder / QUANTIZER), facts.budgets, facts.layout, facts.shots)
        for name, found in labels_of(tokens, facts.tasks).items():
            if found != facts.labels[name]:
                raise RankerError(
                    f"{folder}: the tokenizer reads the answers of task {name!r} as {found}, {FACTS} says "
                    f"{facts.labels[name]}; the two files are of different rankers"
                )
        model = load_model(folder, arithmetic, device)
        rows = len(model.get_input_embeddings().weight)
        if rows < len(tokens):
            raise RankerError(f"{folder}: {len(tokens)} tokens but {rows} embeddings; the parts are of different rankers")
        head = Head.load(folder) if (folder / FUSION_FILE).is_file() else None
        return cls.of(model, prompts, facts, fingerprint, backend=backend, max_tokens=max_tokens, head=head)

    @classmethod
    def of(
        cls,
        model: LlamaForCausalLM,
        prompts: RankPrompts,
        facts: RankerFacts,
        fingerprint: str,
        *,
        backend: str | None = None,
        max_tokens: int = 8192,
        head: Head | None = None,
    ) -> Ranker:
        """A ranker over parts that are already in memory."""
        ids = list(dict.fromkeys(token for pair in facts.labels.values() for token in pair))
        limits = Limits(max_tokens=max_tokens)
        return cls(prompts, facts, fingerprint, Engine(model, ids, backend=backend, limits=limits, revision=fingerprint), head)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks by name, the main one first."""
        return self.facts.tasks

    def item_tokens(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        """Token ids of N items with as-of numbers name -> float [N]: what a snapshot keeps for this ranker."""
        return self.prompts.items(items, numbers)

    def prefix(self, view: MemberView, task: str = "") -> list[int]:
        """Token ids of the prefix for a member and a task ("" is the main one); an instruction stands there only if the ranker
        reads any. Raises TaskError."""
        heard = view if self.facts.reads_wishes else replace(view, instruction="")
        return self.prompts.prefix(heard, task_named(self.tasks, task))

    def prefill_prefix(self, view: MemberView, task: str = "") -> int:
        """The member's prefix is in the engine's cache when `score` comes; returns how many of its tokens had to be computed.

        May run in another thread while retrieval is still at work. Raises TaskError and the errors of `Engine.prefill`.
        """
        return self.engine.prefill(self.prefix(view, task))

    def score(
        self,
        view: MemberView,
        item_tokens: Sequence[Sequence[int]],
        task: str = "",
        relations: Sequence[str] | None = None,
        numbers: Asked | None = None,
    ) -> Floats:
        """Calibrated probabilities float32 [C] of the task's positive answer, in the order of the C candidates.

        `item_tokens` as `item_tokens` made them; `relations` the member's connection to each one's creator ("follows", ""),
        see `ranking.prompts.relations_of`; `numbers` (`ranking.fusion_features.asked_of`) is what the head joins to the words
        where `fuses` says so, None: the words alone. Raises TaskError, FusionError and the errors of `ranking.prefill.plan`.
        """
        asked = task_named(self.tasks, task)
        logits = self.logits(self.prefix(view, task), item_tokens, asked.name, relations)
        if self.head is not None and numbers is not None and self.fuses(asked.name):
            return self.head.probabilities(logits, features(numbers, self.head.static, self.head.base))
        return self.text_probabilities(logits, asked.name)

    def fuses(self, task: str = "") -> bool:
        """Whether numbers join the words for a task ("" is the main one). Raises TaskError."""
        return self.head is not None and task_named(self.tasks, task).name == LABEL

    def text_probabilities(self, logits: Floats, task: str) -> Floats:
        """Calibrated probabilities float32 [C] of the text model alone from its raw scores."""
        return self.facts.calibrators.get(task, Calibrator()).probabilities(logits)

    def logits(
        self, prefix: Sequence[int], item_tokens: Sequence[Sequence[int]], task: str, relations: Sequence[str] | None = None
    ) -> Floats:
        """The raw scores float32 [C] = logit of the positive minus logit of the negative answer."""
        return self.logits_many([(prefix, item_tokens, relations)], task)[0]

    def logits_many(
        self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]], Sequence[str] | None]], task: str
    ) -> list[Floats]:
        """The raw scores of several (prefix, item tokens, relations) of one task, in as few passes as the budget allows."""
        asked = [Request(prefix, self._closed(items, relations)) for prefix, items, relations in requests]
        yes, no = (self.engine.label_ids.index(token) for token in self.facts.labels[task])
        return [found[:, yes] - found[:, no] for found in self.engine.score(asked)]

    def _closed(self, items: Sequence[Sequence[int]], relations: Sequence[str] | None) -> list[list[int]]:
        if relations is None:
            suffix = self.prompts.suffix()
            return [[*item, *suffix] for item in items]
        if len(relations) != len(items):
            raise RankerError(f"{len(relations)} relations were given for {len(items)} candidates; give one for each, or none")
        return [[*item, *self.prompts.suffix(relation)] for item, relation in zip(items, relations)]


def read_facts(folder: Path) -> RankerFacts:
    """The facts of a ranker folder. Raises RankerError with what was seen and what was expected."""
    path = folder / FACTS
    if not path.is_file():
        raise RankerError(f"{folder}: no {FACTS}; expected a ranker folder as `brewline ranker train` writes it")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RankerError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise RankerError(f"{path}: holds a {type(found).__name__}, expected an object; train the ranker again")
    for name, expected in (("format", FORMAT), ("template", TEMPLATE_VERSION), ("rank_template", RANK_TEMPLATE)):
        if found.get(name) != expected:
            raise RankerError(f"{path}: {name} is {found.get(name)!r}, this version reads {expected!r}; train the ranker again")
    try:
        tasks = [Task.from_facts(entry) for entry in found["tasks"]]
        return RankerFacts(
            tasks={task.name: task for task in tasks},
            labels={task.name: (int(found["labels"][task.name][0]), int(found["labels"][task.name][1])) for task in tasks},
            budgets=RankBudgets(**found["budgets"]),
            calibrators={name: Calibrator.from_facts(facts) for name, facts in found["calibrators"].items()},
            encoder=found["encoder"],
            training=found["training"],
            layout=RankLayout(**found.get("layout", {})),  # folders of before have neither
            shots=shots_of(found.get("shots", {})),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RankerError(f"{path}: incomplete ({type(error).__name__}: {error}); train the ranker again") from error


def save_ranker(folder: Path, model: LlamaForCausalLM, prompts: RankPrompts, facts: RankerFacts, head: Head | None = None) -> str:
    """Write a complete ranker folder, readable by stock transformers, and return its fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FUSION_FILE).unlink(missing_ok=True)
    if head is not None:
        head.save(folder)
    save_llama(model, folder)
    prompts.tokens.save(folder)
    prompts.quantizer.save(folder / QUANTIZER)
    content = {
        "format": FORMAT,
        "template": TEMPLATE_VERSION,
        "rank_template": RANK_TEMPLATE,
        "tasks": [task.facts() for task in facts.tasks.values()],
        "labels": {name: list(pair) for name, pair in facts.labels.items()},
        "budgets": facts.budgets.facts(),
        "calibrators": {name: calibrator.facts() for name, calibrator in facts.calibrators.items()},
        "encoder": facts.encoder,
        "training": dict(facts.training),
        "layout": facts.layout.facts(),
        "shots": shots_facts(facts.shots),
    }
    (folder / FACTS).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return folder_fingerprint(folder, _parts(folder))


def _parts(folder: Path) -> tuple[str, ...]:
    """The files that decide this folder's answers."""
    return (*FINGERPRINTED, FUSION_FILE) if (folder / FUSION_FILE).is_file() else FINGERPRINTED


def labels_of(tokens: Tokens, tasks: Mapping[str, Task]) -> dict[str, tuple[int, int]]:
    """The (positive, negative) token ids of each task, two different ones. Raises LabelWordError."""
    found = {name: (label_id(tokens, task.positive), label_id(tokens, task.negative)) for name, task in tasks.items()}
    for name, (yes, no) in found.items():
        if yes == no:
            raise LabelWordError(
                f'this tokenizer reads "{tasks[name].positive}" and "{tasks[name].negative}", the answers of task {name!r}, as '
                "one token; choose words that it tells apart"
            )
    return found
