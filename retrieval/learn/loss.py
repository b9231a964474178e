"""What a batch is judged by: InfoNCE or BCE, corrected for how the batch was drawn, at one or more lengths of the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

Loss = Literal["infonce", "bce"]


@dataclass(frozen=True)
class Match:
    """Which of C columns each of P targets wants: `positive` int64 [P], `log_q` float32 [C] log of the probability that the
    batch holds the column, `hidden` bool [P, C] columns that are no negatives for the target."""

    positive: torch.Tensor
    log_q: torch.Tensor
    hidden: torch.Tensor


def info_nce(
    states: torch.Tensor,
    items: torch.Tensor,
    positive: torch.Tensor,
    log_q: torch.Tensor,
    hidden: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Mean over P targets of -log softmax of the target among C columns.

    states [P, D] and items [C, D] unit vectors, positive int64 [P], log_q float32 [C], hidden bool [P, C], scale a scalar (one
    over the temperature). A negative that the batch holds with probability q stands for 1 / q items of the catalogue, hence
    - log q (Yi et al. 2019, sampling-bias correction); the target itself is always there, so its own column is not
    corrected. With that the score learns log p(item | member), popularity included; without it the popularity of the
    day, by which in-batch negatives are drawn, is divided out.
    """
    logits = scale * (states @ items.T) - log_q[None, :]
    own = torch.zeros_like(logits).scatter_(1, positive[:, None], log_q[positive][:, None])
    logits = (logits + own).masked_fill(hidden, float("-inf"))
    return functional.cross_entropy(logits.float(), positive)


def binary(
    states: torch.Tensor,
    items: torch.Tensor,
    positive: torch.Tensor,
    log_q: torch.Tensor,
    hidden: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Mean over P targets of the binary cross-entropy of each target and of the sum of that of its negatives; as `info_nce`.

    Noise-contrastive estimation (Gutmann and Hyvärinen 2010): the classifier that tells the target from columns drawn with
    probability q has the logit log p - log q, for the target's own column too. So here as there the score learns log p.
    """
    logits = (scale * (states @ items.T) - log_q[None, :]).float()
    own = logits.gather(1, positive[:, None])[:, 0]
    negative = (~hidden).scatter(1, positive[:, None], False)
    return (functional.softplus(-own) + (functional.softplus(logits) * negative).sum(1)).mean()


def objective(
    states: torch.Tensor,
    items: torch.Tensor,
    match: Match,
    scale: torch.Tensor,
    kind: Loss,
    near: float | None,
    dims: Sequence[int],
) -> torch.Tensor:
    """The loss at full length, plus the same over the first k entries of every vector, made unit again, for each k of `dims`.

    `near`: columns whose item has at least this cosine to the target's are no negatives, since they may be copies of it. The
    sum over lengths follows Matryoshka representation learning (Kusupati et al. 2022).
    """
    judge = info_nce if kind == "infonce" else binary
    hidden = match.hidden if near is None else match.hidden | look_alikes(items, match.positive, near)
    total = judge(states, items, match.positive, match.log_q, hidden, scale)
    for length in dims:
        short, shorter = (functional.normalize(vectors[:, :length], dim=-1) for vectors in (states, items))
        total = total + judge(short, shorter, match.positive, match.log_q, hidden, scale)
    return total


def look_alikes(items: torch.Tensor, positive: torch.Tensor, near: float) -> torch.Tensor:
    """Bool [P, C]: another column whose vector has at least the cosine `near` to that of the target's column."""
    found = (items[positive] @ items.T).detach() >= near
    return found.scatter(1, positive[:, None], False)
