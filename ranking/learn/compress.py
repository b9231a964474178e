"""`brewline ranker compress`: the whole plan, and the table that is rewritten after every step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from index.durable import try_lock, write_durably
from index.errors import BrewlineError
from ranking.learn.chain import RECORD, WORK, Chain, Done, Progress
from ranking.learn.compress_plan import CompressPlan, PlanError, Quantize, Step, config_of, configs_of
from ranking.learn.compress_table import Comparison, compared, markdown, row_of
from ranking.learn.examples import sampled
from ranking.learn.loop import LoopSettings
from ranking.learn.prune import weights_of
from ranking.learn.quantize import head_study
from ranking.learn.questions import Ground, ground_of
from ranking.ranker import Ranker, read_facts
from retrieval.data.read import read_dataset
from retrieval.evidence.report import without_nan
from retrieval.provenance import check_provenance

RESULTS, TABLE = "results.json", "results.md"


class GateFailed(BrewlineError):
    """A step lost more than the plan allows; the table says what."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a plan's folder. Raises PlanError if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    held = try_lock(folder)
    if held is None:
        raise PlanError(f"{folder}: another process works here; wait for it or choose another out")
    try:
        yield
    finally:
        os.close(held)


def compress(plan: CompressPlan, tell: Progress) -> dict[str, Any]:
    """Every route of the plan is done for every seed, or stopped at the first step that did not pass its gate; returns what
    OUT/results.json holds, with the reasons of stops under "stopped".

    Finished steps are not done again. Raises what is wrong with the plan, the data or the teacher before anything is trained.
    """
    with alone(plan.out):
        dataset, teacher = read_dataset(plan.data), Ranker.load(plan.teacher)  # its words; weights go to the device when asked
        check_provenance(plan.teacher, teacher.facts.training, dataset)
        ground = _taught(ground_of(dataset, teacher, plan.judged), plan.taught)
        chain = Chain(plan, dataset, ground, teacher, tell)
        root = chain.root()
        table = Table(plan, ground, root, _head_rows(plan, ground))
        for seed in plan.seeds:
            for route in plan.routes:
                for step in chain.route(route, seed, root):
                    table.add(step)
        return table.write(table.comparisons())


def _taught(ground: Ground, candidates: int | None) -> Ground:
    """The ground with about that many candidates of the first task to learn from (None: all), and of each further task the share
    that a round of training holds of it."""
    if candidates is None:
        return ground
    found = {}
    for place, (name, pool) in enumerate(ground.pools.items()):
        wanted = candidates if place == 0 else round(candidates * LoopSettings.others)
        kept = np.zeros(len(pool), bool)
        kept[[group for _, group in sampled(pool, wanted)]] = True
        found[name] = pool.only(kept)
    return replace(ground, pools=found)


def _head_rows(plan: CompressPlan, ground: Ground) -> list[dict[str, object]]:
    """What other precisions of the head make of the teacher's states on the test part."""
    teacher, test = Ranker.load(plan.teacher, device=plan.device), ground.test
    head = teacher.engine.model.get_output_embeddings().weight
    rows = head[list(ground.labels[ground.main])].detach().float().cpu().numpy()
    return [row.facts() for row in head_study(test.states(teacher), rows, test.label, test.member)]


class Table:
    """The rows so far, on disk after each one."""

    def __init__(self, plan: CompressPlan, ground: Ground, root: Done, head: list[dict[str, object]]) -> None:
        self.plan, self.ground, self.root, self.head = plan, ground, root, head
        self.done: list[Done] = []
        self.rows = [row_of(root, root, ground.test.label, ground.test.member)]
        self.write([])

    def add(self, one: Done) -> None:
        """One more step is in the files."""
        self.done.append(one)
        self.rows.append(row_of(one, self.root, self.ground.test.label, self.ground.test.member))
        self.write([])

    def write(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        """Both files, each whole or not at all; returns what the first one holds (NaN where that has null)."""
        gated = [one for one in self.done if self.plan.gates_of(one.route) is not None]
        content: dict[str, Any] = {
            "name": self.plan.name,
            "task": self.ground.main,
            "test_candidates": len(self.ground.test.label),
            "held_candidates": len(self.ground.asked.label),
            "rows": self.rows,
            "comparisons": [one.facts() for one in comparisons],
            "head": self.head,
            "stopped": {f"{one.route}, seed {one.seed}, {one.name}": one.refused for one in gated if one.refused},
        }
        held = json.dumps(without_nan(content), indent=1, allow_nan=False)
        write_durably(self.plan.out / RESULTS, f"{held}\n".encode())
        write_durably(self.plan.out / TABLE, markdown(content).encode())
        return content

    def comparisons(self) -> list[Comparison]:
        """The last trained models of each pair of routes, over the seeds that came there in both."""
        found = []
        ends = {route: _last_trained(steps).name for route, steps in self.plan.routes.items()}
        last = {(one.route, one.seed): one for one in self.done if one.name == ends[one.route]}
        for pair in self.plan.compare:
            seeds = [seed for seed in self.plan.seeds if all((route, seed) in last for route in pair)]
            if seeds:
                sides = [[last[route, seed].test.astype(np.float64) for seed in seeds] for route in pair]
                found.append(compared(*pair, sides[0], sides[1], self.ground.test.label, self.ground.test.member))
        return found


def _last_trained(steps: Sequence[Step]) -> Step:
    """The last step but for formats, which are no other training."""
    return next((step for step in reversed(steps) if not isinstance(step, Quantize)), steps[-1])


def planned(plan: CompressPlan) -> list[dict[str, object]]:
    """What would be done, without reading the data: one row per step of each route, sizes exact. Raises what a run would of
    the teacher's folder and of steps that cannot be."""
    read_facts(plan.teacher)
    config = config_of(plan.teacher)
    found: list[dict[str, object]] = []
    for route, steps in plan.routes.items():
        for number, (step, after) in enumerate(zip(steps, configs_of(steps, config))):
            total, body = weights_of(after)
            folders = [plan.out / route / f"seed-{seed}" / f"{number + 1}-{step.name}" for seed in plan.seeds]
            found.append(
                {
                    "route": route,
                    "step": step.name,
                    "kind": step.kind,
                    "parameters": total,
                    "outside_embeddings": body,
                    "learns": 0 if isinstance(step, Quantize) else step.learn.steps,
                    "seeds": len(plan.seeds),
                    "there": sum((folder / WORK / RECORD).is_file() for folder in folders),
                }
            )
    return found


def refuse_if_stopped(found: Mapping[str, Any], plan: CompressPlan) -> None:
    """Raises GateFailed with every stop's reason if a route did not come to its end."""
    if found["stopped"]:
        reasons = "; ".join(f"{where}: {why}" for where, why in found["stopped"].items())
        raise GateFailed(f"stopped at a gate ({reasons}); the table is {plan.out / TABLE}")
