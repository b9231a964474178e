from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ranking.prefill.request import Request

FAMILY = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True, "attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


class Toy:
    """Tiny random models of the whole family, requests for them, and what a score means: one plain forward per item."""

    labels = (5, 9)

    def model(self, kind: str = "llama", **more: object) -> PreTrainedModel:
        torch.manual_seed(1)
        config, model, extra = FAMILY[kind]
        shape = {
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 600,
            "initializer_range": 0.3,
        }
        made = model(config(**{**shape, **extra, **more})).eval()
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    weight.add_(0.3 * torch.randn_like(weight))
        return made

    def alone(self, model: PreTrainedModel, asked: Request) -> np.ndarray:
        with torch.inference_mode():
            rows = [model(torch.tensor([[*asked.prefix, *item]])).logits[0, -1, list(self.labels)] for item in asked.items]
        return torch.stack(rows).float().numpy()

    def request(self, prefix: int, lengths: list[int], seed: int = 0) -> Request:
        rng = np.random.default_rng(seed)
        return Request(rng.integers(0, 60, prefix).tolist(), [rng.integers(0, 60, n).tolist() for n in lengths])


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()
