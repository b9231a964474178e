"""Which of a few settings is taken: the best on the validation window, or the default where the best is not worth a change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from retrieval.learn.loop import Diverged


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
