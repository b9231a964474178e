from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ranking.learn.loop import Labels, LoopSettings
from ranking.learn.questions import Ground, ground_of
from ranking.learn.start import RankerPlan
from ranking.learn.train import train_ranker
from ranking.prompts import RankBudgets
from ranking.ranker import Ranker
from retrieval.data.schema import Dataset
from retrieval.llama import Size

TEACHER = RankerPlan(
    steps=60,
    minutes=None,
    seed=2,
    size=Size(hidden=32, layers=3, heads=4, kv_heads=2, mlp=96, vocabulary=400),
    budgets=RankBudgets(item=48, prefix=160),
    loop=LoopSettings(learning_rate=5e-3, candidates=48),
)


@pytest.fixture(scope="session")
def teacher_folder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranker that knows the tiny shop's rule. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("compress") / "teacher"
    train_ranker(tiny_dataset, folder, TEACHER)
    return folder


@pytest.fixture(scope="session")
def teacher(teacher_folder: Path) -> Ranker:
    return Ranker.load(teacher_folder)


@pytest.fixture(scope="session")
def ground(tiny_dataset: Dataset, teacher: Ranker) -> Ground:
    return ground_of(tiny_dataset, teacher, 20_000)


@pytest.fixture(scope="session")
def labels(teacher: Ranker) -> Labels:
    return teacher.facts.labels


class PlanWriter:
    """Writes plan files over the tiny shop."""

    def __init__(self, folder: Path, data: Path, teacher: Path) -> None:
        self.folder, self.data, self.teacher = folder, data, teacher

    def __call__(self, routes: object, out: str = "out", **more: object) -> Path:
        places = {"data": str(self.data), "teacher": str(self.teacher), "out": str(self.folder / out)}
        content = {"name": "tiny", **places, "learn": {"candidates": 48, "learning_rate": 0.005}, "routes": routes, **more}
        path = self.folder / "plan.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path


@pytest.fixture
def write_plan(tmp_path: Path, tiny_folder: Path, teacher_folder: Path) -> PlanWriter:
    return PlanWriter(tmp_path, tiny_folder, teacher_folder)
