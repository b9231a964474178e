"""What makes an encoder's folder a model of sentence-transformers: its list of modules, and their settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

POOLING_MODULE, SUM_MODULE, NORMALIZE_MODULE = "1_Pooling", "2_Dense", "3_Normalize"

Pooling = Literal["mean", "last", "mean+last"]


def write_modules(folder: Path, dims: int, max_tokens: int, pooling: Pooling) -> None:
    """The folder's weights and tokenizer open in sentence-transformers, pooled and normalised as `retrieval.encoder` does it."""
    kind = "sentence_transformers.models"
    modules = [("", "Transformer"), (POOLING_MODULE, "Pooling"), (NORMALIZE_MODULE, "Normalize")]
    if pooling == "mean+last":
        modules.insert(2, (SUM_MODULE, "Dense"))
        _write_sum(folder / SUM_MODULE, dims)
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"{kind}.{name}"}
        for number, (path, name) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})
    (folder / POOLING_MODULE).mkdir(exist_ok=True)
    modes = {"pooling_mode_mean_tokens": pooling != "last", "pooling_mode_lasttoken": pooling != "mean"}
    write_json(folder / POOLING_MODULE / "config.json", {"word_embedding_dimension": dims, **modes})
    (folder / NORMALIZE_MODULE).mkdir(exist_ok=True)


def _write_sum(folder: Path, dims: int) -> None:
    """A dense layer that adds up the two halves which the library's pooling puts side by side."""
    folder.mkdir(exist_ok=True)
    shape = {"in_features": 2 * dims, "out_features": dims, "bias": False}
    write_json(folder / "config.json", {**shape, "activation_function": "torch.nn.modules.linear.Identity"})
    save_file({"linear.weight": torch.eye(dims).repeat(1, 2).contiguous()}, folder / "model.safetensors")


def write_json(path: Path, content: object) -> None:
    """The file holds the content: the same content, the same bytes."""
    path.write_text(json.dumps(content, indent=1, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")
