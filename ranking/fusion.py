"""Late fusion: numbers and retrieval's score join the text model's logit in a small head that explains itself.

A text-only ranker loses on counts and affinities (LinkedIn's own finding, arXiv 2602.12354, section 5.1). Here boosted trees
read those numbers (`ranking.trees`), and a logistic regression of a handful of weights joins their logit to the text's. Its
weights were fitted on later events than the models that it joins, so it is calibrated. No torch; stored as plain JSON.

    logit = bias + w . (text, text x history, numbers, pooled rate, retrieval)

Legend: n candidates, F features, K = 5 inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.calibrate import Calibrator, logistic, sigmoid
from ranking.fusion_features import COSINE, LABELS, Features, feature_names
from ranking.trees import Trees
from retrieval.pooled_rate import POOLED

FUSION_FILE = "fusion.json"
FORMAT = 2
TEXT = ("text", "text_history")
INPUTS = (*TEXT, "numbers", "rate", "cosine")
RIDGE = 3.0
"""L2 penalty of each weight: what is only known to a few thousand events stays near nothing."""

Floats = npt.NDArray[np.float64]


class FusionError(BrewlineError):
    """A stored head cannot be read, or it was handed features of another folder."""


@dataclass(frozen=True)
class Blend:
    """Weights float64 [K] of the inputs and a bias; `alone` are those of the same head fitted without the text. `centre` and
    `spread` standardise the cosine: each encoder has a scale of its own, so they belong to the one whose cosines come."""

    weight: Floats
    bias: float
    alone: Floats
    alone_bias: float
    centre: float = 0.0
    spread: float = 1.0

    def facts(self) -> dict[str, object]:
        """The blend as JSON can hold it."""
        named = {"weight": dict(zip(INPUTS, self.weight.tolist())), "alone": dict(zip(INPUTS, self.alone.tolist()))}
        return {**named, "bias": self.bias, "alone_bias": self.alone_bias, "centre": self.centre, "spread": self.spread}

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> Blend:
        """The blend that `facts` described. Raises FusionError."""
        try:
            rows = {name: facts[name] for name in ("weight", "alone")}
            weight, alone = (np.array([float(row[name]) for name in INPUTS]) for row in rows.values())  # type: ignore[index]
            numbers = [float(str(facts[name])) for name in ("bias", "alone_bias", "centre", "spread")]
        except (KeyError, TypeError, ValueError) as error:
            raise FusionError(f"a blend needs weight, alone, bias, alone_bias, centre and spread ({error})") from error
        if not (np.isfinite([*weight, *alone, *numbers]).all() and numbers[3] > 0):
            raise FusionError("a blend holds weights that are not finite; train the head again")
        return cls(weight, numbers[0], alone, numbers[1], numbers[2], numbers[3])


@dataclass(frozen=True)
class Head:
    """What is stored beside a ranker. `static` names the items' own numbers it knows; `base` is the rate of an item without
    labels; `text` puts this ranker's logits on the scale that the blend was fitted on."""

    static: tuple[str, ...]
    base: float
    trees: Trees
    text: Calibrator
    blend: Blend

    @property
    def names(self) -> tuple[str, ...]:
        """The features [F] that the head reads."""
        return feature_names(self.static)

    @property
    def reads_cosine(self) -> bool:
        """Whether the first stage's cosine moves the answer."""
        return bool(self.blend.weight[INPUTS.index("cosine")])

    def logits(self, text: npt.NDArray[np.floating], features: Features) -> Floats:
        """Returns float64 [n] from the text model's raw logits [n] and features [n, F]. Raises FusionError."""
        return self._inputs(text, features) @ self.blend.weight + self.blend.bias

    def probabilities(self, text: npt.NDArray[np.floating], features: Features) -> npt.NDArray[np.float32]:
        """Returns the calibrated probability float32 [n] of label 1."""
        return sigmoid(self.logits(text, features)).astype(np.float32)

    def without_text(self, features: Features) -> npt.NDArray[np.float32]:
        """Returns the probabilities float32 [n] of the same head fitted without the text: the ablation."""
        nothing = np.zeros(len(features))
        return sigmoid(self._inputs(nothing, features) @ self.blend.alone + self.blend.alone_bias).astype(np.float32)

    def contributions(self, text: npt.NDArray[np.floating], features: Features) -> dict[str, Floats]:
        """Returns what "text", every feature and "always" add to the logit, float64 [n] each; their sum is `logits`."""
        inputs = self._inputs(text, features) * self.blend.weight
        weight = dict(zip(INPUTS, self.blend.weight.tolist()))
        shares = self.trees.shares(features) * weight["numbers"]
        found = {name: shares[:, column] for column, name in enumerate(self.names)}
        found[POOLED] = found[POOLED] + inputs[:, INPUTS.index("rate")]
        found[COSINE] = found[COSINE] + inputs[:, INPUTS.index("cosine")]
        always = self.blend.bias + weight["numbers"] * self.trees.expectation
        return {"text": inputs[:, : len(TEXT)].sum(1), **found, "always": np.full(len(features), always)}

    def _inputs(self, text: npt.NDArray[np.floating], features: Features) -> Floats:
        if features.shape != (len(text), len(self.names)):
            raise FusionError(f"the head reads {len(self.names)} features of {len(text)} candidates, got {features.shape}")
        centre = (self.blend.centre, self.blend.spread)
        scaled = self.text.a * np.asarray(text, np.float64) + self.text.b
        return inputs_of(scaled, self.trees.logits(features), features, self.names, self.base, centre)

    def save(self, folder: Path) -> None:
        """Writes `fusion.json`: every number exactly, the same head gives the same bytes."""
        held = {"static": list(self.static), "base": self.base, "text": self.text.facts(), "blend": self.blend.facts()}
        content = {"format": FORMAT, **held, "trees": self.trees.facts()}
        (folder / FUSION_FILE).write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Head:
        """The head of a ranker folder. Raises FusionError, TreesError, CalibrationError."""
        path = folder / FUSION_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise FusionError(f"{path}: format {found['format']!r}, this version reads {FORMAT}; train the ranker again")
            static, base = tuple(str(name) for name in found["static"]), float(found["base"])
            parts = {name: dict(found[name]) for name in ("trees", "text", "blend")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FusionError(f"{path}: not a head ({type(error).__name__}: {error}); train the ranker again") from error
        if not 0 < base < 1:
            raise FusionError(f"{path}: base is {base}, expected a share between 0 and 1; train the ranker again")
        trees = Trees.from_facts(parts["trees"], len(feature_names(static)))
        return cls(static, base, trees, Calibrator.from_facts(parts["text"]), Blend.from_facts(parts["blend"]))


def inputs_of(
    text: Floats, numbers: Floats, features: Features, names: Sequence[str], base: float, centre: tuple[float, float]
) -> Floats:
    """Returns float64 [n, K], the columns of INPUTS; an unknown rate is the base rate, an unknown cosine an average one."""
    rate = np.clip(np.nan_to_num(features[:, names.index(POOLED)].astype(np.float64), nan=base), 1e-3, 1 - 1e-3)
    cosine = np.nan_to_num((features[:, names.index(COSINE)] - centre[0]) / centre[1])
    known = np.log1p(features[:, names.index(LABELS)].astype(np.float64))
    return np.column_stack([text, text * known, numbers, np.log(rate / (1 - rate)), cosine])


def centre_of(cosine: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Returns mean and standard deviation of the known cosines [n]; 0 and 1 without any."""
    known = np.asarray(cosine, np.float64)[np.isfinite(cosine)]
    return (float(known.mean()), float(max(known.std(), 1e-6))) if len(known) else (0.0, 1.0)


def fit_blend(
    text: Floats, numbers: Floats, features: Features, names: Sequence[str], base: float, label: npt.NDArray[np.integer]
) -> Blend:
    """Returns the weights that minimise the log loss of labels (1 or 0) [n] that neither model has seen.

    `text` are calibrated logits of the text model, `numbers` those of the trees, `names` of the features [n, F].
    """
    centre = centre_of(features[:, names.index(COSINE)])
    inputs = inputs_of(text, numbers, features, names, base, centre)
    weight, bias = _fitted(inputs, label, np.ones(len(INPUTS), bool))
    alone, alone_bias = _fitted(inputs, label, np.array([name not in TEXT for name in INPUTS]))
    return Blend(weight, bias, alone, alone_bias, *centre)


def _fitted(inputs: Floats, label: npt.NDArray[np.integer], allowed: npt.NDArray[np.bool_]) -> tuple[Floats, float]:
    """Weights [K] (0 where not allowed, or where the input never differs) and the bias."""
    used = np.flatnonzero(allowed & (inputs.std(0) > 0))
    design = np.column_stack([inputs[:, used], np.ones(len(inputs))])
    ridge = np.append(np.full(len(used), RIDGE), 1e-6 * len(inputs))
    found = logistic(design, np.asarray(label, np.float64), ridge, np.zeros(len(ridge)))
    weight = np.zeros(inputs.shape[1])
    weight[used] = found[:-1]
    return weight, float(found[-1])
