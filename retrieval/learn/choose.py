"""Which of a few settings is taken: the best on the validation window, or the default where the best is not worth a change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from retrieval.learn.loop import Diverged

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Trials:
    """How rates are tried: `multiples` of the default, `share` of the validation steps for all together, `least` steps below
    which one tells nothing, and `worth`, by which another rate must be better."""

    multiples: Sequence[float]
    share: float
    least: int
    worth: float


class Trial(Protocol):
    """What a trial needs of a training."""

    def again(self, steps: int, rate: float) -> Self:
        """The same start with another length and rate."""

    def run(self, until: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Trains up to a step."""


T = TypeVar("T", bound=Trial)


def try_rates(
    first: T, total: int, default: float, trials: Trials, judge: Callable[[T], float], report: Progress
) -> tuple[float, dict[float, float], int]:
    """The learning rate, what each tried one reached after a short whole schedule, and how many of `total` steps that took.

    Where a trial would be too short to tell, the default is taken untried.
    """
    each = int(total * trials.share / len(trials.multiples))
    if each < trials.least:
        return default, {}, 0

    def reached(rate: float) -> float:
        trainer = first.again(each, rate)
        trainer.run(each, lambda done, of: report(f"try rate {rate:g}", done, of))
        return judge(trainer)

    rate, tried = choose_rate([multiple * default for multiple in trials.multiples], reached, trials.worth, default)
    return rate, tried, each * len(tried)


def choose_rate(
    candidates: Sequence[float], judge: Callable[[float], float], worth: float, default: float
) -> tuple[float, dict[float, float]]:
    """The chosen learning rate, and what every candidate scored (more is better, the default judged first).

    A candidate is taken only if it beats the default by `worth` or more. One whose loss does not stay finite scores 0.
    """
    found: dict[float, float] = {}
    for rate in dict.fromkeys([default, *candidates]):
        try:
            found[rate] = judge(rate)
        except Diverged:
            found[rate] = 0.0
    best = max(found, key=lambda rate: found[rate])
    return (best if found[best] >= found[default] + worth else default), found
