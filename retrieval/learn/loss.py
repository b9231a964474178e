"""InfoNCE over one batch, corrected for how the batch was drawn."""

from __future__ import annotations

import torch
from torch.nn import functional


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
