"""Numbers become words: a fitted table of boundaries turns each value into one bucket, and each bucket has a name.

Percentile buckets 1-100 follow arXiv 2510.14223 (numbers section); unlike there, a bucket is one vocabulary entry that names its
field too ("<|n_7d:42|>"), so a small model need not learn to bind a shared "42" to the field before it. Log buckets resolve
a heavy head that a percentile over a whole catalogue would put into one bucket. Boundaries are fitted on training data
only and travel in the model folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError

Kind = Literal["percentile", "log", "percentile_text", "raw"]
PERCENTILES = 100
LOG_BUCKETS = 64
LOG_STEPS_PER_DOUBLING = 4
MISSING = 0
"""The bucket of NaN, of a value that was never given, and of a field that had no known value when the table was fitted."""


class QuantizerError(BrewlineError):
    """A quantizer file or a field name does not fit."""


@dataclass(frozen=True)
class Quantizer:
    """Boundaries of each number field, in prompt order.

    `tables` name -> float64 boundaries: 99 percentiles, or for "log" the one scale below which everything is bucket 1. An
    empty table means that no value was known at fitting time: every value of that field is MISSING.
    """

    kind: Kind
    tables: Mapping[str, npt.NDArray[np.float64]]

    @classmethod
    def fit(cls, values: Mapping[str, npt.NDArray[np.floating]], kind: Kind = "percentile") -> Quantizer:
        """Boundaries from training values, name -> any number of floats (NaN and infinities left out)."""
        if kind not in get_args(Kind):
            raise QuantizerError(f"quantizer kind {kind!r} is unknown; choose one of {', '.join(get_args(Kind))}")
        tables = {}
        for name, column in values.items():
            known = np.asarray(column, np.float64)
            known = known[np.isfinite(known)]
            tables[name] = _boundaries(known, kind) if len(known) else np.zeros(0)
        return cls(kind, tables)

    @property
    def names(self) -> tuple[str, ...]:
        """The number fields, in prompt order."""
        return tuple(self.tables)

    @property
    def n_buckets(self) -> int:
        """Buckets 1..n_buckets exist beside MISSING."""
        return LOG_BUCKETS if self.kind == "log" else PERCENTILES

    def bucket(self, name: str, values: npt.NDArray[np.floating]) -> npt.NDArray[np.int16]:
        """Buckets int16 [n] of values float [n]: 0 missing; -inf is the lowest bucket, +inf the highest."""
        if name not in self.tables:
            raise QuantizerError(f"number field {name!r} was not fitted; known fields: {', '.join(self.tables)}")
        table, column = self.tables[name], np.asarray(values, np.float64)
        if not len(table):
            return np.zeros(len(column), np.int16)
        if self.kind == "log":
            with np.errstate(invalid="ignore"):
                steps = np.floor(LOG_STEPS_PER_DOUBLING * np.log2(1 + np.maximum(column, 0) / table[0]))
            found = 1 + np.clip(np.nan_to_num(steps, posinf=LOG_BUCKETS), 0, LOG_BUCKETS - 1)
        else:
            found = 1 + np.searchsorted(table, column, side="right")
        return np.where(np.isnan(column), MISSING, found).astype(np.int16)

    def words(self, name: str, values: npt.NDArray[np.floating]) -> list[tuple[str, str]]:
        """(token, text) of each value: one bucket token without text, or the field's token followed by digits."""
        if self.kind == "raw":
            return [(field_token(name), "" if np.isnan(value) else f"{value:.6g}") for value in values.tolist()]
        buckets = self.bucket(name, values).tolist()
        if self.kind == "percentile_text":
            return [(field_token(name), "" if bucket == MISSING else str(bucket)) for bucket in buckets]
        return [(bucket_token(name, bucket), "") for bucket in buckets]

    def tokens(self) -> list[str]:
        """Every token that `words` can return, buckets of one field side by side in rising order."""
        if self.kind in ("raw", "percentile_text"):
            return [field_token(name) for name in self.tables]
        return [bucket_token(name, bucket) for name in self.tables for bucket in range(self.n_buckets + 1)]

    def save(self, path: Path) -> None:
        """Writes the table as JSON; the same table always gives the same bytes."""
        facts = {"kind": self.kind, "tables": {name: table.tolist() for name, table in self.tables.items()}}
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Quantizer:
        """The table that `save` wrote. Raises QuantizerError naming the file."""
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            tables = {str(name): np.asarray(table, np.float64) for name, table in facts["tables"].items()}
            kind = facts["kind"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantizerError(f"{path}: not a quantizer file ({error}); train the model again") from error
        if kind not in get_args(Kind):
            raise QuantizerError(f"{path}: quantizer kind {kind!r} is unknown to this version")
        return cls(kind, tables)


def field_token(name: str) -> str:
    """The token that opens a number field written in digits."""
    return f"<|{name}|>"


def bucket_token(name: str, bucket: int) -> str:
    """The token of one bucket of one number field."""
    return f"<|{name}:{'none' if bucket == MISSING else bucket}|>"


def _boundaries(known: npt.NDArray[np.float64], kind: Kind) -> npt.NDArray[np.float64]:
    if kind == "log":
        positive = known[known > 0]
        return np.array([np.quantile(positive, 0.01) if len(positive) else 1.0])
    return np.quantile(known, np.arange(1, PERCENTILES) / PERCENTILES)
