"""What both trainings keep so that a killed run can go on: weights and optimizer as safetensors, decisions as JSON.

Both carry the training's identity: the plan, a digest of the data and what else decides the weights. Nothing goes on under
another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from index.durable import fsync_path
from index.errors import BrewlineError
from retrieval.data.schema import Dataset
from retrieval.learn.ranks import Ranks, part_like, whole

STATE = "state.safetensors"
DECISION = "decision.json"
DATA = "data"
"""The key of an identity that holds `dataset_digest`."""
DIGEST_LENGTH = 20

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


def dataset_digest(dataset: Dataset) -> str:
    """20 hex digits that differ if anything differs that can decide weights: all but the name of the data, its extra facts and
    the items' facets.

    Every column goes in with its name, type and length, every text with its length, so that no two data sets run together.
    """
    whole = hashlib.sha256()
    meta, items = replace(dataset.meta, name="", extra={}), replace(dataset.items, facets={})
    for name, column in _columns("", replace(dataset, meta=meta, items=items)):
        if isinstance(column, np.ndarray):
            kind, parts = column.dtype.str, [np.ascontiguousarray(column).data]
        else:
            text = "".join(column).encode("utf-8", "surrogatepass")
            kind, parts = "text", [np.fromiter(map(len, column), np.int64, len(column)).data, memoryview(text)]
        whole.update(f"{name!a} {kind} {len(column)}\n".encode())
        for part in parts:
            whole.update(part)
    return whole.hexdigest()[:DIGEST_LENGTH]


def _columns(name: str, held: Any) -> Iterator[tuple[str, np.ndarray | Sequence[str]]]:
    """Every column below a record or mapping, with its dotted name; a single value is a column of one text."""
    if is_dataclass(held):
        held = {field.name: getattr(held, field.name) for field in fields(held)}
    if isinstance(held, Mapping):
        for key, value in held.items():
            yield from _columns(f"{name}.{key}", value)
    else:
        yield name, held if isinstance(held, np.ndarray | list | tuple) else [str(held)]


def save_state(
    folder: Path,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, object],
    identity: Mapping[str, object],
) -> None:
    """Writes weights, optimizer state, `facts` and the training's identity as one file, whole or not at all.

    What is spread over processes is gathered tensor by tensor (all must call); the first process writes it.
    """
    held = {f"model.{name}": weight.detach() for name, weight in weights}
    for number, state in optimizer.state_dict()["state"].items():
        held |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    leads, tensors = Ranks.here().leads, dict[str, torch.Tensor]()
    for name, tensor in held.items():
        gathered = whole(tensor)
        if leads:
            tensors[name] = gathered.cpu().contiguous()
    if not leads:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "state.tmp", metadata={"facts": json.dumps({**facts, "identity": identity})})
    fsync_path(folder / "state.tmp")
    (folder / "state.tmp").replace(folder / STATE)
    fsync_path(folder)


def load_state(
    folder: Path, weights: Weights, optimizer: torch.optim.Optimizer, identity: Mapping[str, object]
) -> dict[str, Any] | None:
    """Puts a saved state back in place and returns its facts, or None if there is none.

    Of weights that are spread over any number of processes each takes its part. Raises TrainingError if the state belongs to
    a training with another identity.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    states: dict[int, dict[str, torch.Tensor]] = {}
    with _opened(path) as file, torch.no_grad():
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        check_identity(path, facts.get("identity", {}), identity)
        for name, weight in weights:
            weight.copy_(part_like(file.get_tensor(f"model.{name}"), weight))
        for key in file.keys():  # noqa: SIM118 - a file of tensors is no mapping
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                number, _, name = rest.partition(".")
                states.setdefault(int(number), {})[name] = part_like(file.get_tensor(key), trained[int(number)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return facts


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); delete this file to train from the start") from error


def remembered(work: Path, identity: Mapping[str, object]) -> dict[str, Any] | None:
    """What an earlier, killed run of the same training decided (with its "identity"), or None if there is no such file.

    Raises TrainingError if it belongs to a training with another identity.
    """
    path = work / DECISION
    if not path.is_file():
        return None
    decision: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_identity(path, decision.get("identity", {}), identity)
    return decision


def check_identity(path: Path, held: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raises TrainingError naming what differs between the identity that a file holds and the one that is wanted."""
    was, now = _flat(held), _flat(json.loads(json.dumps(wanted)))
    changed = [name for name in {**was, **now} if was.get(name, "absent") != now.get(name, "absent")]
    if not changed:
        return
    parts = [f"{name} was {was.get(name, 'absent')!r}, is {now.get(name, 'absent')!r}" for name in changed if name != DATA]
    words = ["settings: " + ", ".join(parts)] if parts else []
    if DATA in changed:
        words.append(f"the data changed since: digest {was.get(DATA, 'absent')}, now {now.get(DATA, 'absent')}")
    raise TrainingError(
        f"{path} belongs to another plan or other data ({'; '.join(words)}); "
        "give the same again to go on, or remove it or choose another --out to start anew"
    )


def _flat(nested: Mapping[str, Any], before: str = "") -> dict[str, object]:
    """Leaves of nested mappings by dotted name."""
    found: dict[str, object] = {}
    for name, value in nested.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) and value else {f"{before}{name}": value}
    return found


def write_json(path: Path, content: object) -> None:
    """Writes a small file for people and later runs."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
