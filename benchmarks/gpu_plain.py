"""The plain ways of Hugging Face that the prefill engine is timed beside on a GPU, and how a call is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

from ranking.prefill.plan import Request

LABELS, WARM_UPS, REPEATS = (2, 3), 3, 10
Report = dict[str, object]


class Plain:
    """The plain model's ways: no head over the vocabulary, label rows in float32, ids on the device beforehand."""

    def __init__(self, model: LlamaForCausalLM, request: Request) -> None:
        self.prefix, self.items = (torch.tensor(ids, device=model.device) for ids in (request.prefix, request.items))
        self._body, self._labels = model.model, model.get_output_embeddings().weight[list(LABELS)].float()

    @torch.inference_mode()
    def singles(self, batch: int) -> np.ndarray:
        """The first `batch` items as full prompts in one pass."""
        rows = torch.cat([self.prefix.expand(batch, -1), self.items[:batch]], 1)
        return self._read(self._body(input_ids=rows, use_cache=False).last_hidden_state[:, -1])

    @torch.inference_mode()
    def prefix_cache(self, batch: int) -> np.ndarray:
        """The prefix once, then all items over views of its keys and values, `batch` in a pass."""
        kept, parts = DynamicCache(), []
        self._body(input_ids=self.prefix[None], past_key_values=kept, use_cache=True)
        for some in self.items.split(batch):
            cache = DynamicCache()
            for number, layer in enumerate(kept.layers):
                cache.update(layer.keys[:, :, :0], layer.values[:, :, :0], number)
                wide = cache.layers[number]
                wide.keys, wide.values = (part.expand(len(some), -1, -1, -1) for part in (layer.keys, layer.values))
            parts.append(self._read(self._body(input_ids=some, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]))
        return np.concatenate(parts)

    @torch.inference_mode()
    def packed(self, mask: torch.Tensor) -> np.ndarray:
        """One sequence with restarted positions under a dense mask."""
        (count, length), first = self.items.shape, len(self.prefix)
        places = torch.cat([torch.arange(first), torch.arange(first, first + length).repeat(count)]).to(mask.device)
        ids = torch.cat([self.prefix, self.items.flatten()])[None]
        found = self._body(input_ids=ids, attention_mask=mask, position_ids=places[None], use_cache=False)
        return self._read(found.last_hidden_state[0, first + length - 1 :: length])

    def mask(self) -> torch.Tensor:
        """[1, 1, T, T], added to the scores."""
        first, rows = len(self.prefix), len(self.prefix) + self.items.numel()
        row = torch.arange(rows, device=self.items.device)
        item = torch.where(row < first, -1, (row - first) // self.items.shape[1])
        hidden = (row[:, None] < row) | ((item != -1) & (item[:, None] != item))
        return torch.zeros(1, 1, rows, rows, dtype=self._body.dtype, device=row.device).masked_fill_(hidden, float("-inf"))

    def _read(self, hidden: torch.Tensor) -> np.ndarray:
        return (hidden.float() @ self._labels.T).cpu().numpy()


def seconds(run: Callable[[], object], device: str, before: Callable[[], object] = int) -> float:
    """The median time of a call; `before` runs untimed before each."""
    found = []
    for _ in range(WARM_UPS + REPEATS):
        before()
        began = time.perf_counter()
        if device == "cpu":
            run()
            found.append(time.perf_counter() - began)
            continue
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1000)
    return statistics.median(found[WARM_UPS:])


def tried(run: Callable[[], Report]) -> Report:
    """What a step found, or why it failed."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def timed(run: Callable[[], object], device: str, times: float = 1) -> Report:
    return tried(lambda: {"p50_ms": 1000 * seconds(run, device) * times})
