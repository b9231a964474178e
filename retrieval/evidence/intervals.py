"""How sure a mean is: standard errors and bootstrap intervals over members, paired for differences, all seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
RESAMPLES = 2000
COVERAGE = 0.95
NORMAL_95 = 1.96
"""Standard errors in half of a 95 % interval, where a sum of variances takes the place of resampling."""
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and its 95 % bootstrap interval."""

    value: float
    error: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The four numbers by name."""
        return asdict(self)


def estimate(values: Values, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Returns the mean of one number per member with its uncertainty over members."""
    return estimates({"": values}, seed, resamples)[""]


def estimates(columns: Mapping[str, Values], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """Returns the mean of each column [Q] with its uncertainty; the same members are drawn for all columns."""
    if not columns or not len(next(iter(columns.values()))):
        return {name: Estimate(np.nan, np.nan, np.nan, np.nan) for name in columns}
    means = resampled_means(np.column_stack(list(columns.values())), seed, resamples)
    found = {}
    for column, (name, values) in enumerate(columns.items()):
        found[name] = Estimate(float(values.mean()), standard_error(values), *interval(means[:, column]))
    return found


def paired_differences(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """Returns mean(ours - theirs) of each metric with its uncertainty; both runs answer for the same member in each resample."""
    for name, values in ours.items():
        if values.shape != theirs[name].shape:
            raise ValueError(f"Paired runs need the same members: {values.shape} and {theirs[name].shape}.")
    return estimates({name: values - theirs[name] for name, values in ours.items()}, seed, resamples)


def standard_error(values: Values) -> float:
    """Returns the standard error of the mean; NaN for fewer than two values."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def resampled_means(values: Values, seed: int = 0, resamples: int = RESAMPLES) -> Values:
    """Returns [R, C]: the column means of R samples with replacement of the rows of `values` [Q, C]."""
    rng = np.random.default_rng(seed)
    size = len(values)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // size)
    for begin in range(0, resamples, step):
        weights = resample_weights(rng, size, min(step, resamples - begin))
        means[begin : begin + len(weights)] = weights @ values / size
    return means


def resample_weights(rng: np.random.Generator, size: int, resamples: int) -> Values:
    """Returns [R, size]: how often each of `size` members is drawn in each of R samples with replacement."""
    draws = rng.integers(0, size, (resamples, size)) + np.arange(resamples)[:, None] * size
    return np.bincount(draws.ravel(), minlength=resamples * size).reshape(resamples, size).astype(np.float64)


def interval(samples: Values, coverage: float = COVERAGE) -> tuple[float, float]:
    """Returns the percentile interval of bootstrap samples [R]."""
    low, high = np.quantile(samples, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
