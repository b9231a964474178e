"""Scores many items after each prefix in as few passes as the token budget allows, and reads only the labels' logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from index.errors import BrewlineError
from ranking.prefill.attend import choose
from ranking.prefill.llama import Kept, Layers, cascade
from ranking.prefill.plan import Chunk, Limits, Request, plan

Logits = npt.NDArray[np.float32]


class LabelError(BrewlineError):
    """Label ids that cannot be read: none, repeated, or outside the vocabulary."""


class UnknownToken(BrewlineError):
    """A token id that the model has no embedding for."""


class Engine:
    """Multi-item scoring over one Hugging Face LLaMA, whose weights it shares.

    `backend` names the attention backend in use, `label_ids` the tokens whose logits are read. The logits are computed
    in float32 from float32 copies of the label rows, whatever the precision of the body. Not safe for concurrent calls
    that also train the model.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        label_ids: Sequence[int],
        *,
        backend: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Raises LabelError, BackendMissing (a named `backend` cannot run here) and UnsupportedModel."""
        rows = len(model.get_input_embeddings().weight)
        _check_labels(label_ids, rows)
        device = model.get_input_embeddings().weight.device
        chosen = choose(backend, device.type)
        self.model = model.eval()
        self.backend = chosen.name
        self.label_ids = tuple(label_ids)
        self.limits = limits or Limits(max_positions=model.config.max_position_embeddings)
        self._layers = Layers(model, cascade(chosen.attend))
        self._vocabulary = rows
        head = model.get_output_embeddings().weight
        self._labels = head.detach()[torch.tensor(self.label_ids, device=device)].float()

    def score(self, requests: Sequence[Request]) -> list[Logits]:
        """Return for each request the logits float32 [N, labels] at the last token of its N items, in input order.

        Each row is what the model says about `prefix + item` alone. Raises the errors of `plan`, and UnknownToken.
        """
        planned = plan(requests, self.limits)
        logits = np.empty((planned.unique_items, len(self.label_ids)), np.float32)
        kept: Kept = {}
        with torch.inference_mode():
            for chunk in planned.chunks:
                self._check_tokens(chunk)
                hidden = self._layers.read(chunk, kept)
                logits[chunk.unique] = (hidden.float() @ self._labels.T).cpu().numpy()
        return [logits[rows] for rows in planned.fan_out]

    def _check_tokens(self, chunk: Chunk) -> None:
        low, high = int(chunk.tokens.min()), int(chunk.tokens.max())
        if low < 0 or high >= self._vocabulary:
            wrong = low if low < 0 else high
            raise UnknownToken(f"token id {wrong} is outside the model's vocabulary of {self._vocabulary}")


def _check_labels(label_ids: Sequence[int], vocabulary: int) -> None:
    if not label_ids or len(set(label_ids)) != len(label_ids):
        raise LabelError(f"labels need distinct token ids, got {list(label_ids)}")
    if min(label_ids) < 0 or max(label_ids) >= vocabulary:
        raise LabelError(f"label ids {list(label_ids)} do not fit a vocabulary of {vocabulary}")
