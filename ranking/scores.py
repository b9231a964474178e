"""What a model says of the rows of an evaluation. No torch here: reports read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ranking.baselines import Scored

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OrderOnly(Scored):
    """A baseline whose numbers put the rows in order and are no probabilities: nothing but the order is judged."""


@dataclass(frozen=True)
class Scores:
    """Probabilities float64 [E] of label 1: `final` as served, `text` of the words alone, and what explains the difference:
    `without_text` of the head fitted without the words (None: no head), `cosine` of the first stage (None: no encoder)."""

    final: Floats
    text: Floats
    without_text: Floats | None = None
    cosine: Floats | None = None
