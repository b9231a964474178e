"""The option that says how a ranker multiplies."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class RankerArithmetic(StrEnum):
    """How the ranker's projections multiply; "auto" is the faster of the first two on this machine."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    auto = "auto"
    int8 = "int8"


How = Annotated[
    RankerArithmetic,
    typer.Option(
        help="How the ranker multiplies. float32: as it learned. int8: its layers take a quarter of the memory and, from a "
        "width of 256 on, half to nine tenths of the time, but probabilities move by up to a few hundredths. auto: "
        "bfloat16 on CPUs with matrix units for it, else float32, never int8.",
    ),
]
