"""Where a model computes, by the name that people give."""

from __future__ import annotations

import torch

from index.errors import BrewlineError

KINDS = ("cpu", "cuda")


class DeviceMissing(BrewlineError):
    """The device that was asked for is not there."""


def checked_device(name: str) -> torch.device:
    """The device of a name ("cpu", "cuda", "cuda:1"), which is there. Raises DeviceMissing."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceMissing(f"device {name!r} is unknown; expected cpu, cuda, or one GPU of several as cuda:1") from error
    if device.type not in KINDS:
        raise DeviceMissing(f"models run on {' and '.join(KINDS)}, got device {name!r}")
    if device.type == "cpu" and device.index is not None:
        raise DeviceMissing(f"device {name!r}: all processors are one device, cpu")
    if device.type == "cuda" and (device.index or 0) >= (seen := torch.cuda.device_count()):
        raise DeviceMissing(
            f"device {name!r} was asked for, and torch {torch.__version__} sees {seen} CUDA devices; take cpu, or install a "
            "torch that is built for your driver (pytorch.org/get-started)"
        )
    return device
