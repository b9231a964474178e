"""The options by which a snapshot or an evaluation takes another form than the plain dense one."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from retrieval.hybrid import HybridSettings


class CodesChoice(StrEnum):
    """What item vectors are kept in: 4, 2 or 1 bytes a number."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


HybridWeights = Annotated[
    str | None,
    typer.Option(
        help="Weights of the hybrid's dense, lexical and popularity list, as in 1,0.5,0.5 (the default).",
        metavar="D,L,P",
        show_default=False,
    ),
]


def hybrid_settings(hybrid: bool, weights: str | None) -> HybridSettings | None:
    """Returns the settings of a wished hybrid first stage, None if there is no such wish.

    Raises BadParameter for weights without --hybrid, HybridError for weights that mean nothing.
    """
    if weights is not None and not hybrid:
        raise typer.BadParameter("they weigh the hybrid's lists: say --hybrid too", param_hint="--hybrid-weights")
    if not hybrid:
        return None
    from retrieval.hybrid import HybridSettings

    return HybridSettings() if weights is None else HybridSettings.parse(weights)
