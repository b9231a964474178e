"""Plan files of `brewline ranker stages`: what a ranker reads first, what it learns then, and what each stage must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator

from ranking.calibrate import Method
from ranking.learn.compress_plan import PlanError
from ranking.learn.gates import Gates
from ranking.learn.settings import plan_of
from ranking.learn.start import RankerPlan
from ranking.tasks_file import read_tasks, task_of
from retrieval.learn.plan_file import read_plan

FORBID = ConfigDict(extra="forbid")
MEASURES = (
    "auc", "paraphrase_auc", "unseen_auc", "surface_auc", "format",
    "wish_right", "new_words_right", "contradiction_right", "text_loss",
)  # fmt: skip
"""What the suite (`ranking.learn.stages_suite`) says of a stage."""
DECIDED = ("steps", "minutes", "seed", "learning_rate", "lora_rank", "calibration", "fusion", "wishes", "share")
DECIDED_PARTS = ("loop.", "groups.")
"""Settings of a training that the stages decide, that the plan has under a name of its own, or that nothing here would heed."""
ABOVE_0 = ("steps", "learning_rate", "tokens", "candidates", "temperature", "beta")
AT_LEAST_0 = ("checkpoint_seconds", "others", "anchor")
"""Numbers of a stage, where its kind has them."""


@dataclass(frozen=True)
class StageGate:
    """What a stage must reach: `lost` what it may cost against the stage before (None: anything), and bounds of MEASURES."""

    __pydantic_config__ = FORBID

    lost: Gates | None = None
    least: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all stages say: how long, how fast, and their gate."""

    __pydantic_config__ = FORBID

    name: str
    steps: int = 200
    learning_rate: float = 1e-3
    checkpoint_seconds: float = 120.0
    gate: StageGate = field(default_factory=StageGate)


@dataclass(frozen=True, kw_only=True)
class Text(Stage):
    """Continued pre-training: the next token of item texts and of members' histories, `tokens` at least in a step."""

    kind: Literal["text"]
    tokens: int = 4096


@dataclass(frozen=True, kw_only=True)
class Tasks(Stage):
    """All tasks in their served wording, mixed as `ranking.learn.batches.Order` says."""

    kind: Literal["tasks"]
    candidates: int = 80
    others: float = 0.05
    temperature: float | None = None


@dataclass(frozen=True, kw_only=True)
class Instructions(Stage):
    """The same questions in other words, a share of them with a member's wish and the answers that it changes."""

    kind: Literal["instructions"]
    candidates: int = 80
    others: float = 0.05
    temperature: float | None = None
    wishes: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Align(Stage):
    """Preferences inside a group: what was chosen above what was not, by more than the stage before had it, which `anchor` holds
    the answers to (`ranking.learn.stages_train`)."""

    kind: Literal["align"]
    candidates: int = 80
    others: float = 0.05
    temperature: float | None = None
    beta: float = 1.0
    anchor: float = 1.0


AnyStage = Text | Tasks | Instructions | Align


@dataclass(frozen=True)
class StagesPlan:
    """What a file asks for. `start`: settings of `brewline ranker train` by name that make step 0 (`size.hidden`, `base`,
    `encoder`, ...). `tasks`: a tasks file; `unseen`: FILE#NAME of a task that no stage may see; `surface`: one whose answers no
    stage learns from. `judged` candidates and `lists` members at most are asked by gates, suite and table."""

    __pydantic_config__ = FORBID

    name: str
    data: Path
    out: Path
    stages: list[Annotated[AnyStage, Discriminator("kind")]]
    start: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    tasks: Path | None = None
    unseen: str | None = None
    surface: str = ""
    judged: int = 20_000
    lists: int = 60
    calibration: Method = "platt"
    device: str = "cpu"

    @classmethod
    def read(cls, path: Path) -> StagesPlan:
        """The plan of a YAML file. Raises PlanError, TrainingError (a setting of `start`), TaskError."""
        found = read_plan(path, cls, PlanError)
        if wrong := _wrong(found):
            raise PlanError(f"{path}: {wrong}")
        found.ranker()
        if found.unseen is not None:
            task_of(found.unseen)
        return found

    def ranker(self) -> RankerPlan:
        """Step 0 as `ranking.learn.start` wants it."""
        tasks = () if self.tasks is None else tuple(read_tasks(self.tasks).values())
        return replace(plan_of({**self.start, "steps": 1, "seed": self.seed}), tasks=tasks)


def _wrong(plan: StagesPlan) -> str:
    """What types cannot refuse, in words; "" if nothing."""
    names = [stage.name for stage in plan.stages]
    if not names or min(plan.judged, plan.lists) < 1:
        return "no stages, or nothing to judge on; there is nothing to do"
    if len(set(names)) < len(names) or not all(_plain(name) for name in names):
        return "names of stages must differ, and be letters, digits, blanks, - and _ alone"
    if decided := [name for name in plan.start if name in DECIDED or name.startswith(DECIDED_PARTS)]:
        return f"start: {', '.join(decided)} is not for step 0; stages and plan say it, or it would change nothing"
    for stage in plan.stages:
        if wrong := _wrong_numbers(stage) or _wrong_gate(stage.gate, plan):
            return f"stage {stage.name!r}: {wrong}"
    return ""


def _wrong_numbers(stage: AnyStage) -> str:
    for name, value in facts_of(stage).items():
        if name in ABOVE_0 and isinstance(value, int | float) and not 0 < value < math.inf:
            return f"{name} must be above 0, and is {value:g}"
        if name in AT_LEAST_0 and isinstance(value, int | float) and not 0 <= value < math.inf:
            return f"{name} must be 0 or more, and is {value:g}"
    if isinstance(stage, Instructions) and not 0 <= stage.wishes <= 1:
        return f"wishes is {stage.wishes}; expected a share from 0 to 1"
    return ""


def _wrong_gate(gate: StageGate, plan: StagesPlan) -> str:
    """Why no stage could pass a gate, or nothing could be told of it."""
    asked = {*gate.least, *gate.most}
    if unknown := asked - {*MEASURES}:
        return f"unknown measures {', '.join(sorted(unknown))}; known are {', '.join(MEASURES)}"
    for name, given in (("unseen", plan.unseen), ("surface", plan.surface)):
        if f"{name}_auc" in asked and not given:
            return f"its gate asks for {name}_auc, and the plan names no `{name}`"
    limits = [*gate.least.values(), *gate.most.values(), *([] if gate.lost is None else asdict(gate.lost).values())]
    if not all(math.isfinite(limit) for limit in limits if isinstance(limit, float)):
        return "a limit of its gate is no finite number"
    return ""


def _plain(name: str) -> bool:
    return bool(name.strip()) and all(letter.isalnum() or letter in " -_" for letter in name)


def facts_of(stage: AnyStage) -> Mapping[str, object]:
    """A stage as its folder records it: all that decides its bytes, so without its gate."""
    return {name: value for name, value in asdict(stage).items() if name != "gate"}
