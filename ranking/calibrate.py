"""A logit becomes a probability that means what it says: fitted on later data than the model, stored with it.

Calibrators are monotone, so they never reverse an order. Formulas: Platt 1999 (sigmoid of a*s + b), temperature scaling
(b = 0, arXiv 1706.04599), isotonic regression by pooling adjacent violators (Zadrozny and Elkan 2002;
it makes ties). Expected calibration error over bins of equal mass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError

Method = Literal["platt", "isotonic", "temperature", "identity"]
Floats = npt.NDArray[np.floating]
BINS = 15
ENOUGH = 20
"""Examples of each class below which nothing is fitted."""


class CalibrationError(BrewlineError):
    """A stored calibrator cannot be read, or what it should be fitted on does not allow it."""


@dataclass(frozen=True)
class Calibrator:
    """probability = sigmoid(a * logit + b); "isotonic": the line through `knots` (logit, probability), level beyond them.

    `n` examples were used; `method` "identity" means that nothing was fitted.
    """

    method: Method = "identity"
    a: float = 1.0
    b: float = 0.0
    n: int = 0
    knots: tuple[tuple[float, float], ...] = ()

    def probabilities(self, logits: Floats) -> npt.NDArray[np.float32]:
        """Probabilities float32 [n] of the positive answer from logits [n] = z_yes - z_no."""
        if self.knots:
            at, height = np.array(self.knots).T
            return np.interp(np.asarray(logits, np.float64), at, height).astype(np.float32)
        return sigmoid(self.a * np.asarray(logits, np.float64) + self.b).astype(np.float32)

    def facts(self) -> dict[str, object]:
        """The calibrator as JSON can hold it."""
        facts = asdict(self)
        return facts if self.knots else {name: value for name, value in facts.items() if name != "knots"}

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> Calibrator:
        """The calibrator that `facts` described. Raises CalibrationError."""
        try:
            a, b, n = float(str(facts["a"])), float(str(facts["b"])), int(str(facts["n"]))
            method = str(facts["method"])
            knots = np.array(facts.get("knots", ()), np.float64).reshape(-1, 2)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"a calibrator needs method, a, b and n, got {facts!r}") from error
        if method not in get_args(Method) or not (np.isfinite([a, b]).all() and a > 0):
            raise CalibrationError(f"a calibrator needs a known method, a > 0 and a finite b, got {facts!r}")
        rising = (np.diff(knots, axis=0) >= 0).all() and ((knots[:, 1] >= 0) & (knots[:, 1] <= 1)).all()
        if (method == "isotonic") != bool(len(knots)) or not (np.isfinite(knots).all() and rising):
            raise CalibrationError(f"knots must be rising pairs of a logit and a probability, for isotonic alone, got {facts!r}")
        return cls(method, a, b, n, tuple((float(at), float(height)) for at, height in knots))  # type: ignore[arg-type]


def fit(logits: Floats, labels: npt.NDArray[np.integer], method: Method = "platt") -> Calibrator:
    """Return the calibrator that minimises the log-loss of labels (1 or 0) [n] given logits [n].

    Too few examples of a class, or logits that rank the labels backwards, give the identity: a calibrator may correct
    confidence, not reverse an order. Raises CalibrationError on logits that are not finite.
    """
    s, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    if not np.isfinite(s).all():
        raise CalibrationError(f"{int((~np.isfinite(s)).sum())} of {len(s)} logits are not finite")
    positives = float(y.sum())
    if method == "identity" or min(positives, len(y) - positives) < ENOUGH:
        return Calibrator(n=len(y))
    if method == "isotonic":
        return Calibrator(method, n=len(y), knots=_isotonic(s, y))
    design = np.stack([s, np.ones_like(s)], 1) if method == "platt" else s[:, None]
    weights = logistic(design, y, np.full(design.shape[1], 1e-6 * len(s)), np.eye(design.shape[1])[0])
    a, b = float(weights[0]), float(weights[1]) if method == "platt" else 0.0
    if not (np.isfinite([a, b]).all() and a > 0):
        return Calibrator(n=len(y))
    return Calibrator(method, a, b, len(y))


def logistic(design: Floats, y: Floats, ridge: Floats, start: Floats) -> Floats:
    """Return the weights float64 [k] of a logistic regression of y [n] on a design [n, k], by damped Newton steps.

    `ridge` [k] is the L2 penalty of each weight; a tiny one is felt by separable data only.
    """
    weights = np.asarray(start, np.float64)
    for _ in range(100):
        p = sigmoid(design @ weights)
        gradient = design.T @ (p - y) + ridge * weights
        curvature = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        scale = 1.0
        while scale > 1e-4 and _loss(design, y, weights - scale * step, ridge) > _loss(design, y, weights, ridge):
            scale /= 2
        weights = weights - scale * step
        if np.abs(scale * step).max() < 1e-10:
            break
    return weights


def _loss(design: Floats, y: Floats, weights: Floats, ridge: Floats) -> float:
    z = design @ weights
    return float((np.logaddexp(0, z) - y * z).sum() + (ridge * weights * weights).sum() / 2)


def _isotonic(s: Floats, y: Floats) -> tuple[tuple[float, float], ...]:
    """The rising step function nearest to y, as the middle and height of each step; each knows one unseen answer of either kind,
    so that no probability is 0 or 1."""
    at, place = np.unique(s, return_inverse=True)
    count, good = np.bincount(place), np.bincount(place, y)
    blocks: list[list[float]] = []  # sum of logits, positives, examples
    for block in zip((at * count).tolist(), good.tolist(), count.tolist()):  # equal logits are one block, in whatever order
        blocks.append([*block])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
            last = blocks.pop()
            blocks[-1] = [held + more for held, more in zip(blocks[-1], last)]
    share = y.mean()
    heights = np.maximum.accumulate([(right + 2 * share) / (size + 2) for _, right, size in blocks])
    heights = np.minimum(heights, 1 - 1 / (len(y) + 2))  # a label as expected at the mean place can be more than 1
    return tuple((total / size, float(height)) for (total, _, size), height in zip(blocks, heights))


def sigmoid(z: Floats) -> Floats:
    """1 / (1 + exp(-z)) without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(z, np.float64)))


def calibration_error(probabilities: Floats, labels: npt.NDArray[np.integer], bins: int = BINS) -> float:
    """Return the expected calibration error over bins of equal mass: mean |mean prediction - share of positives|."""
    if not len(labels):
        return float("nan")
    order = np.argsort(probabilities, kind="stable")
    p, y = np.asarray(probabilities, np.float64)[order], np.asarray(labels, np.float64)[order]
    parts = np.array_split(np.arange(len(y)), min(bins, len(y)))
    return float(sum(abs(p[part].mean() - y[part].mean()) * len(part) for part in parts) / len(y))


def auc(scores: Floats, labels: npt.NDArray[np.integer]) -> float:
    """Return the probability that a positive scores above a negative, ties counting half; NaN if a class is missing."""
    y = np.asarray(labels) == 1
    positives, negatives = int(y.sum()), int((~y).sum())
    if not positives or not negatives:
        return float("nan")
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count - 1) / 2
    return float((middle[rank][y].sum() - positives * (positives + 1) / 2) / (positives * negatives))
