"""What a training's minutes are counted in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from retrieval.data.schema import Dataset
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.clock import clock_of
from retrieval.learn.fit import train_encoder
from retrieval.learn.loop import Loop
from retrieval.learn.settings import plan_of

SMALL: dict[str, Any] = {"hidden": 16, "layers": 1, "vocabulary": 400, "targets": 8, "random_items": 8, "learning_rate": 1e-3}


def test_waiting_costs_no_processor_time() -> None:
    took = {}
    for kind in ("wall", "processor"):
        clock = clock_of(kind)
        began = clock()
        time.sleep(0.5)
        took[kind] = clock() - began
    assert took["wall"] >= 0.5 > 2 * took["processor"]


def test_a_training_that_others_slow_down_is_as_long_in_processor_time(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step waits as if another process had its core: on the wall only a few steps are left, in processor time hundreds."""
    whole = Loop.run

    def waited(self: Loop, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.4)
        whole(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "run", waited)
    steps = {}
    for kind in ("wall", "processor"):
        plan = plan_of({**SMALL, "minutes": 0.1, "clock": kind})
        steps[kind] = train_encoder(tiny_dataset, tmp_path / kind, plan).steps
    assert steps["processor"] > 2 * steps["wall"]


def test_an_unknown_clock_is_refused() -> None:
    with pytest.raises(TrainingError, match="clock"):
        plan_of({"minutes": 1.0, "clock": "sundial"})
    with pytest.raises(TrainingError, match="on the device cpu"):
        plan_of({"minutes": 1.0, "clock": "processor", "device": "cuda"})
    with pytest.raises(TrainingError, match="steps"):
        plan_of({"steps": 0})


def test_a_length_and_a_rate_that_are_given_need_no_validation_run(tiny_dataset: Dataset, tmp_path: Path) -> None:
    given = {**SMALL, "steps": 4, "seed": 3}
    with_run, without = (
        train_encoder(tiny_dataset, tmp_path / str(run), plan_of({**given, "validation": run})) for run in (True, False)
    )
    assert with_run.validation and not without.validation and not (tmp_path / "False" / "validation").exists()
    one, other = ((tmp_path / str(run) / "model.safetensors").read_bytes() for run in (True, False))
    assert one == other, "the run that only looks decides nothing"
    with pytest.raises(TrainingError, match="chooses steps and learning_rate"):
        plan_of({"minutes": 1.0, "learning_rate": 1e-3, "validation": False})
    assert with_run.fingerprint == without.fingerprint
