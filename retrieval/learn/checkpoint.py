"""What both trainings keep so that a killed run can go on: weights and optimizer as safetensors, decisions as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from index.errors import BrewlineError

STATE = "state.safetensors"
DECISION = "decision.json"

Weights = Iterable[tuple[str, torch.Tensor]]


class TrainingError(BrewlineError):
    """Training cannot start or go on."""


def check_room(out: Path, facts: str, what: str) -> None:
    """Raises TrainingError if `out` is a file or already holds a finished model (the file `facts`)."""
    if (out / facts).exists():
        raise TrainingError(f"{out} already holds {what}; choose another --out or remove it")
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; --out must be a folder")


def weight_groups(trained: Iterable[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay, gains and scalars do not."""
    weights = list(trained)
    return [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]


def save_state(folder: Path, weights: Weights, optimizer: torch.optim.Optimizer, facts: Mapping[str, object]) -> None:
    """Writes weights, optimizer state and `facts` (with the key "plan") as one file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": weight.detach().contiguous() for name, weight in weights}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    save_file(tensors, folder / "state.tmp", metadata={"facts": json.dumps(facts)})
    (folder / "state.tmp").replace(folder / STATE)


def load_state(
    folder: Path, weights: Weights, optimizer: torch.optim.Optimizer, plan: Mapping[str, object]
) -> dict[str, Any] | None:
    """Puts a saved state back in place and returns its facts, or None if there is none. Raises TrainingError on another plan."""
    path = folder / STATE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    if facts["plan"] != json.loads(json.dumps(plan)):
        raise TrainingError(f"{path} belongs to another plan ({facts['plan']}); remove it or ask for the same")
    tensors = load_file(path)
    with torch.no_grad():
        for name, weight in weights:
            weight.copy_(tensors[f"model.{name}"])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            number, _, name = rest.partition(".")
            states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return facts


def remembered(work: Path, plan: Mapping[str, object]) -> dict[str, Any] | None:
    """What an earlier, killed run of the same plan decided, or None. Raises TrainingError on another plan."""
    path = work / DECISION
    if not path.is_file():
        return None
    decision: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if decision["plan"] != json.loads(json.dumps(plan)):
        raise TrainingError(f"{work} belongs to a training with other settings; remove it or choose another --out")
    return decision


def write_json(path: Path, content: object) -> None:
    """Writes a small file for people and later runs."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
