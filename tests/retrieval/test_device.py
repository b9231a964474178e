"""A device that is not there is told before any work begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrieval.data.schema import Dataset
from retrieval.device import DeviceMissing, checked_device
from retrieval.learn.fit import train_encoder
from retrieval.learn.ranks import joined
from retrieval.learn.settings import plan_of


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpu", "unknown"), ("meta", "cpu and cuda"), ("cuda:99", "sees"), ("cpu:0", "one device"), ("", "unknown")],
)
def test_what_is_not_there_is_refused_with_what_there_is(name: str, said: str) -> None:
    with pytest.raises(DeviceMissing, match=said):
        checked_device(name)
    with pytest.raises(DeviceMissing, match=said), joined(name):
        pass


def test_a_training_refuses_before_it_begins(tiny_dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DeviceMissing, match="cuda:99"):
        train_encoder(tiny_dataset, tmp_path / "out", plan_of({"steps": 1, "device": "cuda:99"}))


def test_the_processor_is_always_there() -> None:
    assert checked_device("cpu") == torch.device("cpu")
