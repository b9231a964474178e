"""Plan files of `brewline ranker compress`: a teacher, some routes from it to something smaller, and what each step may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, TypeAdapter
from transformers import AutoConfig, LlamaConfig

from index.errors import BrewlineError
from ranking.calibrate import Method
from ranking.learn.distill import Learning
from ranking.learn.gates import Gates
from ranking.learn.prune import MOST, Keep, pruned_config
from ranking.learn.quantize import Format, check_fp8
from retrieval.learn.plan_file import read_plan
from retrieval.llama import Size, new_config

FORBID = ConfigDict(extra="forbid")
Teaches = Literal["parent", "root"]
"""Who answers for a student: the model of the step before, or the plan's teacher."""


class PlanError(BrewlineError):
    """A plan file cannot be used."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a new student; words, numbers and prompts are its parent's."""

    __pydantic_config__ = FORBID

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Distill:
    """A smaller model learns from a teacher's answers: a new one of a `size`, or the checkpoint of a folder, `base`, that has the
    teacher's tokenizer (its rows for the field tokens are new)."""

    __pydantic_config__ = FORBID

    kind: Literal["distill"]
    name: str
    size: Shape | None = None
    base: str | None = None
    learn: Learning = field(default_factory=Learning)
    teacher: Teaches = "parent"


@dataclass(frozen=True)
class Scratch:
    """A new model (nothing of it is the teacher's) or a checkpoint learns from labels alone: what distillation has to beat."""

    __pydantic_config__ = FORBID

    kind: Literal["scratch"]
    name: str
    size: Shape | None = None
    base: str | None = None
    learn: Learning = field(default_factory=Learning)


@dataclass(frozen=True)
class Prune:
    """Structures leave the parent, then it learns again. `batches` groups of `learn.candidates` say what each one is worth;
    `one_shot` lifts the limit of a step."""

    __pydantic_config__ = FORBID

    kind: Literal["prune"]
    name: str
    keep: Keep
    learn: Learning = field(default_factory=Learning)
    teacher: Teaches = "parent"
    batches: int = 16
    one_shot: bool = False


@dataclass(frozen=True)
class Quantize:
    """The parent in a smaller format; with `onnx` also as an onnxruntime int8 engine in the folder, under a gate of its own."""

    __pydantic_config__ = FORBID

    kind: Literal["quantize"]
    name: str
    to: Format
    onnx: bool = False


Step = Distill | Scratch | Prune | Quantize


@dataclass(frozen=True)
class CompressPlan:
    """What a file asks for. `routes` name -> steps, each from the one before, the first from `teacher`; every route runs once
    for each seed. `budget`: training steps that every route must sum to (None: not compared). `judged`: candidates at most that
    gates and table look at, `taught` those of the first task that teachers are asked about and students learn from (None: all).
    `compare`: pairs of routes whose last trained models are set side by side."""

    __pydantic_config__ = FORBID

    name: str
    data: Path
    teacher: Path
    out: Path
    routes: dict[str, list[Annotated[Step, Discriminator("kind")]]]
    seeds: list[int] = field(default_factory=lambda: [1])
    budget: int | None = None
    gates: Gates = field(default_factory=Gates)
    ungated: list[str] = field(default_factory=list)
    compare: list[tuple[str, str]] = field(default_factory=list)
    calibration: Method = "platt"
    judged: int = 20_000
    taught: int | None = None
    device: str = "cpu"

    @classmethod
    def read(cls, path: Path) -> CompressPlan:
        """The plan of a YAML file; `learn` at its top is the default of every step. Raises PlanError naming what is wrong."""
        plan = read_plan(path, cls, PlanError, _with_defaults)
        if wrong := _wrong(plan):
            raise PlanError(f"{path}: {wrong}")
        return plan

    def gates_of(self, route: str) -> Gates | None:
        """What a route's steps may cost; None: they are measured only."""
        return None if route in self.ungated else self.gates


def _with_defaults(found: Any) -> Any:
    """The file's content with its `learn` put under each step that trains; what has another form is left to validation."""
    if not isinstance(found, dict) or "learn" not in found:
        return found
    learn = found.pop("learn")
    routes = found.get("routes")
    for steps in routes.values() if isinstance(routes, dict) else ():
        for step in steps if isinstance(steps, list) else ():
            if isinstance(step, dict) and step.get("kind") != "quantize" and isinstance(learn, dict):
                own = step.get("learn", {})
                step["learn"] = {**learn, **own} if isinstance(own, dict) else own
    return found


def _wrong(plan: CompressPlan) -> str:
    """What types cannot refuse, in words; "" if nothing."""
    least = min(plan.judged, 1 if plan.taught is None else plan.taught)
    if not plan.routes or not all(plan.routes.values()) or not plan.seeds or least < 1:
        return "no routes, a route without steps, no seeds, nothing to judge on or to learn from; there is nothing to do"
    unknown = {*plan.ungated, *(name for pair in plan.compare for name in pair)} - plan.routes.keys()
    if unknown:
        return f"unknown routes {', '.join(sorted(unknown))}; known are {', '.join(plan.routes)}"
    for route, steps in plan.routes.items():
        names = [step.name for step in steps]
        if len(set(names)) < len(names) or not all(_plain(name) for name in (*names, route)):
            return f"route {route!r}: step names must differ, and be letters, digits, blanks, - and _ alone, like the route's"
        starts = [step for step in steps if isinstance(step, Distill | Scratch)]
        if any((step.size is None) == (step.base is None) for step in starts):
            return f"route {route!r}: a student starts from one of size and base"
        learned = [step.learn for step in steps if not isinstance(step, Quantize)]
        if any(min(one.steps, one.kl, one.label, one.hidden) < 0 or one.temperature <= 0 for one in learned):
            return f"route {route!r}: steps and the losses' weights must be 0 or more, the temperature more"
        if plan.budget is not None and (spent := sum(one.steps for one in learned)) != plan.budget:
            return f"route {route!r} trains {spent} steps, the budget is {plan.budget}; give every route the same"
    return ""


def _plain(name: str) -> bool:
    return bool(name.strip()) and all(letter.isalnum() or letter in " -_" for letter in name)


def configs_of(steps: list[Step], teacher: LlamaConfig) -> list[LlamaConfig]:
    """The configuration after each step. Raises PruneError for a cut that cannot be, and the errors of `check_fp8`."""
    found = [teacher]
    for step in steps:
        if isinstance(step, Prune):
            found.append(pruned_config(found[-1], step.keep, 1.0 if step.one_shot else MOST))
        elif isinstance(step, Quantize):
            if step.to == "fp8":
                check_fp8()
            found.append(found[-1])
        else:
            found.append(_student(step, teacher.vocab_size))
    return found[1:]


def _student(step: Distill | Scratch, vocabulary: int) -> LlamaConfig:
    shape = step.size
    if shape is not None:
        return new_config(Size(shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.mlp, vocabulary), vocabulary)
    config = config_of(str(step.base))
    config.vocab_size = max(config.vocab_size, vocabulary)
    return config


def config_of(path: str | Path) -> LlamaConfig:
    """The configuration of a LLaMA checkpoint, without its weights. Raises PlanError."""
    try:
        config = AutoConfig.from_pretrained(path)  # LlamaConfig's own loader would take an empty folder for LLaMA 7B
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: no LLaMA checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(config, LlamaConfig):
        raise PlanError(f"{path}: no LLaMA checkpoint but {config.model_type!r}")
    return config


def facts_of(step: Step) -> Mapping[str, object]:
    """A step as its folder records it."""
    facts: dict[str, Any] = TypeAdapter(Step).dump_python(step, mode="json")
    if isinstance(step, Prune) and step.keep.hidden is None:  # folders of before do not name it
        del facts["keep"]["hidden"]
    return facts
