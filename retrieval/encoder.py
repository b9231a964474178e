"""The dual encoder: one LLaMA reads items and members into one space of unit vectors.

A folder is complete (weights, tokenizer, quantizer, prompt template, budgets, pooling) and has one fingerprint; nothing about it
can be overridden at load. sentence-transformers opens the same folder and gives the same vectors for a rendered prompt.
Cosine similarity and mean pooling over all tokens follow arXiv 2510.14223. A mean alone cannot know which token is the last, so
not which part of a history is new; "mean+last" adds the state of the last token to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from index.errors import BrewlineError
from retrieval.data.schema import Item, MemberView
from retrieval.features import Quantizer
from retrieval.fingerprint import folder_fingerprint
from retrieval.llama import load_llama, pad_rows, save_llama
from retrieval.prompts import PAD, TEMPLATE_VERSION
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

FORMAT = 1
FACTS = "encoder.json"
QUANTIZER = "quantizer.json"
FINGERPRINTED = (FACTS, QUANTIZER, "tokenizer.json", "config.json", "model.safetensors")
TOKENS_PER_BATCH = 8_192
POOLING_MODULE, SUM_MODULE, NORMALIZE_MODULE = "1_Pooling", "2_Dense", "3_Normalize"
VALIDATION = "validation"
"""Folder inside an encoder's folder: the encoder of the validation run, which saw nothing at or after `cut_valid`. What is itself
judged on the validation window starts from this one. It is not there if the data asks nothing between the cuts."""

Pooling = Literal["mean", "last", "mean+last"]
Vectors = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


class EncoderError(BrewlineError):
    """A folder is not a complete encoder of this version."""


class Encoder:
    """Items and members as unit vectors float32 [n, D], D the model's width or the first `dims` entries of it."""

    def __init__(
        self, model: PreTrainedModel, writer: Writer, fingerprint: str, facts: Mapping[str, Any], dims: int | None = None
    ) -> None:
        self.model = model.eval()
        self.writer = writer
        self.fingerprint = fingerprint
        self.facts = facts
        self.pooling: Pooling = facts.get("pooling", "mean")
        self._dims = dims

    @property
    def dims(self) -> int:
        """D, the length of every vector."""
        return self._dims or int(self.model.config.hidden_size)

    def truncated(self, dims: int) -> Encoder:
        """The encoder whose vectors are the first `dims` entries of this one's, made unit again, under a fingerprint of its own.

        `facts["matryoshka"]` lists the lengths that training looked at; others lose more. Raises EncoderError if it is longer.
        """
        if not 0 < dims <= self.dims:
            raise EncoderError(f"vectors of {dims} dims were asked for; this encoder has {self.dims}")
        return Encoder(self.model, self.writer, f"{self.fingerprint}-{dims}", self.facts, dims)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", *, whole_log: bool = False) -> Encoder:
        """The encoder of a complete folder. Raises EncoderError, MissingPart, TokenizerError or CheckpointError.

        `whole_log`: the caller hands in every action of a member. An encoder that reads whole histories is refused without it,
        since records in the service keep engagements only.
        """
        facts = read_facts(folder)
        if facts.get("history") == "full" and not whole_log:
            raise EncoderError(
                f"{folder} reads every action of a member, and what is kept of members is engagements only; "
                "it can be judged by `brewline experiment run`, but not served. Train with --history positives"
            )
        fingerprint = folder_fingerprint(folder, FINGERPRINTED)
        budgets, whole = Budgets(**facts["budgets"]), facts.get("history") == "full"
        writer = Writer(Tokens.load(folder), Quantizer.load(folder / QUANTIZER), budgets, tuple(facts["actions"]), whole)
        return cls(load_llama(folder, causal_lm=False).to(device), writer, fingerprint, facts)

    def items(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray], progress: Progress | None = None) -> Vectors:
        """Unit vectors [N, D] of N items with as-of numbers name -> float [N]."""
        return self.embed(self.writer.items(items, numbers), progress)

    def members(self, views: Sequence[MemberView], progress: Progress | None = None) -> Vectors:
        """Unit vectors [M, D] of M members."""
        return self.embed(self.writer.members(views), progress)

    def item_digests(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[str]:
        """A digest of each item's exact id row: equal digests mean an equal vector under this fingerprint."""
        return [row_digest(row) for row in self.writer.items(items, numbers)]

    def embed(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> Vectors:
        """Unit vectors [n, D] of id rows, computed in batches of similar length, returned in input order."""
        found = np.empty((len(rows), self.dims), np.float32)
        done = 0
        with torch.inference_mode():
            for batch in length_batches([len(row) for row in rows], TOKENS_PER_BATCH):
                ids, lengths = pad_rows([rows[number] for number in batch], self.writer.tokens.pad)
                device = self.model.device
                vectors = encode(self.model, ids.to(device), lengths.to(device), self.pooling)
                if self._dims is not None:
                    vectors = functional.normalize(vectors[:, : self._dims], dim=-1)
                found[batch] = vectors.float().cpu().numpy()
                done += len(batch)
                if progress is not None:
                    progress(done, len(rows))
        return found


def encode(model: PreTrainedModel, ids: torch.Tensor, lengths: torch.Tensor, pooling: Pooling = "mean") -> torch.Tensor:
    """Unit vectors [B, D] of right-padded rows [B, T]: the mean of each row's last hidden states, the last of them, or the sum
    of the two."""
    hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1].float()
    if pooling == "last":
        return functional.normalize(last, dim=-1)
    real = torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths[:, None]
    mean = (hidden * real[..., None]).sum(1, dtype=torch.float32) / lengths[:, None]
    return functional.normalize(mean if pooling == "mean" else mean + last, dim=-1)


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of rows in rising length, cut so that rows x longest row stays within `tokens` (at least one row)."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= tokens:
            stop += 1
        yield order[start:stop]
        start = stop


def row_digest(row: Sequence[int]) -> str:
    """A short digest of one id row."""
    return hashlib.blake2b(np.asarray(row, np.int32).tobytes(), digest_size=12).hexdigest()


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of an encoder folder. Raises EncoderError with what was seen and what was expected."""
    path = folder / FACTS
    if not path.is_file():
        raise EncoderError(f"{folder}: no {FACTS}; expected an encoder folder as `brewline encoder train` writes it")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: not JSON ({error})") from error
    expected = {"format": (FORMAT,), "template": (TEMPLATE_VERSION,), "pooling": get_args(Pooling)}
    for name, known in expected.items():
        if facts.get(name) not in known:
            reads = " or ".join(map(repr, known))
            raise EncoderError(f"{path}: {name} is {facts.get(name)!r}, this version reads {reads}; train the encoder again")
    return facts


def stored_fingerprint(folder: Path) -> str:
    """The fingerprint of an encoder folder, without loading the weights into a model."""
    return folder_fingerprint(folder, FINGERPRINTED)


def save_encoder(
    folder: Path,
    model: PreTrainedModel,
    writer: Writer,
    training: Mapping[str, Any],
    *,
    pooling: Pooling = "mean",
    matryoshka: Sequence[int] = (),
) -> str:
    """Writes a complete encoder folder, readable by sentence-transformers too, and returns its fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_llama(model, folder)
    writer.tokens.save(folder)
    PreTrainedTokenizerFast(tokenizer_object=writer.tokens.tokenizer, pad_token=PAD, padding_side="right").save_pretrained(folder)
    # The wrapper re-serialises the tokenizer; ours is the one that counts and must be byte-stable.
    writer.tokens.save(folder)
    writer.quantizer.save(folder / QUANTIZER)
    dims = model.config.hidden_size
    facts = {
        "format": FORMAT,
        "template": TEMPLATE_VERSION,
        "pooling": pooling,
        "normalised": True,
        "dims": dims,
        "matryoshka": list(matryoshka),
        "history": "full" if writer.whole else "positives",
        "budgets": writer.budgets.facts(),
        "actions": list(writer.actions),
        "training": dict(training),
    }
    _write_json(folder / FACTS, facts)
    _write_sentence_transformers(folder, dims, writer.budgets.member, pooling)
    return folder_fingerprint(folder, FINGERPRINTED)


def _write_sentence_transformers(folder: Path, dims: int, max_tokens: int, pooling: Pooling) -> None:
    kind = "sentence_transformers.models"
    modules = [("", "Transformer"), (POOLING_MODULE, "Pooling"), (NORMALIZE_MODULE, "Normalize")]
    if pooling == "mean+last":
        modules.insert(2, (SUM_MODULE, "Dense"))
        _write_sum(folder / SUM_MODULE, dims)
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"{kind}.{name}"}
        for number, (path, name) in enumerate(modules)
    ]
    _write_json(folder / "modules.json", listed)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})
    (folder / POOLING_MODULE).mkdir(exist_ok=True)
    modes = {"pooling_mode_mean_tokens": pooling != "last", "pooling_mode_lasttoken": pooling != "mean"}
    _write_json(folder / POOLING_MODULE / "config.json", {"word_embedding_dimension": dims, **modes})
    (folder / NORMALIZE_MODULE).mkdir(exist_ok=True)


def _write_sum(folder: Path, dims: int) -> None:
    """A dense layer that adds up the two halves which the library's pooling puts side by side."""
    folder.mkdir(exist_ok=True)
    shape = {"in_features": 2 * dims, "out_features": dims, "bias": False}
    _write_json(folder / "config.json", {**shape, "activation_function": "torch.nn.modules.linear.Identity"})
    save_file({"linear.weight": torch.eye(dims).repeat(1, 2).contiguous()}, folder / "model.safetensors")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")
