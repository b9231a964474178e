"""The dual encoder: one LLaMA reads items and members into one space of unit vectors.

A folder is complete (weights, tokenizer, quantizer, prompt template, budgets, pooling) and has one fingerprint; nothing about it
can be overridden at load. sentence-transformers opens the same folder and gives the same vectors for a rendered prompt.
Cosine similarity and mean pooling over all tokens follow arXiv 2510.14223. A mean alone cannot know which token is the last, so
not which part of a history is new; "mean+last" adds the state of the last token to it.

An encoder that was loaded reads rows without padding (`retrieval.packed`), one in training calls the Hugging Face module. Both
give the same vectors to 1e-5 in float32, which is what equal fingerprints promise; one of them alone gives a row the same vector
whatever stands beside it, to 1e-6 (packed on one thread, bit for bit).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from index.errors import BrewlineError
from retrieval.data.schema import Item, MemberView
from retrieval.device import checked_device
from retrieval.features import Quantizer
from retrieval.fingerprint import folder_fingerprint
from retrieval.llama import load_llama, pad_rows, save_llama
from retrieval.packed import Packed, packed
from retrieval.prompts import PAD, TEMPLATE_VERSION
from retrieval.sentence_modules import Pooling, write_json, write_modules
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

FORMAT = 1
FACTS = "encoder.json"
QUANTIZER = "quantizer.json"
FINGERPRINTED = (FACTS, QUANTIZER, "tokenizer.json", "config.json", "model.safetensors")
TOKENS_PADDED, TOKENS_PACKED, TOKENS_ELSEWHERE = 8_192, 32_768, 131_072
"""Tokens of a batch: read by the module, packed, and packed on a GPU, where each length of row is a launch per layer."""
ROWS_AHEAD = 4_096
"""Rows that are written and tokenised while those before them are read."""
VALIDATION = "validation"
"""Folder inside an encoder's folder: the encoder of the validation run, which saw nothing at or after `cut_valid`. What is itself
judged on the validation window starts from this one. It is not there if the data asks nothing between the cuts."""

Precision = Literal["float32", "bfloat16"]
PRECISIONS: Mapping[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Vectors = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


class EncoderError(BrewlineError):
    """A folder is not a complete encoder of this version."""


class Encoder:
    """Items and members as unit vectors float32 [n, D], D the model's width or the first `dims` entries of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        writer: Writer,
        fingerprint: str,
        facts: Mapping[str, Any],
        dims: int | None = None,
        packed: Packed | None = None,
    ) -> None:
        """`packed` reads rows instead of the module: it must be made of it, and the module's weights must not be replaced."""
        self.model = model.eval()
        self.writer = writer
        self.fingerprint = fingerprint
        self.facts = facts
        self.pooling: Pooling = facts.get("pooling", "mean")
        self._dims = dims
        self._packed = packed

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
        return Encoder(self.model, self.writer, f"{self.fingerprint}-{dims}", self.facts, dims, self._packed)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", *, whole_log: bool = False, precision: Precision = "float32") -> Encoder:
        """The encoder of a complete folder. Raises EncoderError, MissingPart, TokenizerError, CheckpointError or DeviceMissing.

        In "bfloat16" it is another encoder, under a fingerprint of its own: its vectors differ in the third digit. It is faster
        where `retrieval.packed.has_bfloat16_units` says so, and slower elsewhere.

        `whole_log`: the caller hands in every action of a member. An encoder that reads whole histories is refused without it,
        since records in the service keep engagements only.
        """
        where, facts = checked_device(device), read_facts(folder)
        if facts.get("history") == "full" and not whole_log:
            raise EncoderError(
                f"{folder} reads every action of a member, and what is kept of members is engagements only; "
                "it can be judged by `brewline experiment run`, but not served. Train with --history positives"
            )
        fingerprint = folder_fingerprint(folder, FINGERPRINTED)
        budgets, whole = Budgets(**facts["budgets"]), facts.get("history") == "full"
        writer = Writer(Tokens.load(folder), Quantizer.load(folder / QUANTIZER), budgets, tuple(facts["actions"]), whole)
        if precision == "bfloat16":
            fingerprint += "-bf16"
        model = load_llama(folder, causal_lm=False, dtype=PRECISIONS[precision]).to(where)
        return cls(model, writer, fingerprint, facts, packed=packed(model))

    def items(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray], progress: Progress | None = None) -> Vectors:
        """Unit vectors [N, D] of N items with as-of numbers name -> float [N]."""

        def written(some: slice) -> list[list[int]]:
            return self.writer.items(items[some], {name: column[some] for name, column in numbers.items()})

        return self._embed_all(len(items), written, progress)

    def members(self, views: Sequence[MemberView], progress: Progress | None = None) -> Vectors:
        """Unit vectors [M, D] of M members."""
        return self._embed_all(len(views), lambda some: self.writer.members(views[some]), progress)

    def item_digests(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[str]:
        """A digest of each item's exact id row: equal digests mean an equal vector under this fingerprint."""
        return [row_digest(row) for row in self.writer.items(items, numbers)]

    def embed(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> Vectors:
        """Unit vectors [n, D] of id rows, computed in batches of similar length, returned in input order.

        Raises EncoderError for a row without tokens.
        """
        lengths = [len(row) for row in rows]
        if min(lengths, default=1) == 0:
            raise EncoderError(f"row {lengths.index(0)} has no tokens; expected at least one")
        found = np.empty((len(rows), self.dims), np.float32)
        done = 0
        with torch.inference_mode():
            for batch in length_batches(lengths, self._tokens_of_a_batch()):
                found[batch] = self._read([rows[number] for number in batch]).cpu().numpy()
                done += len(batch)
                if progress is not None:
                    progress(done, len(rows))
        return found

    def _embed_all(self, count: int, written: Callable[[slice], list[list[int]]], progress: Progress | None) -> Vectors:
        """Unit vectors [count, D] of the rows that `written` makes; some are made while those before them are read."""
        found = np.empty((count, self.dims), np.float32)
        for some, rows in ahead(written, [slice(first, first + ROWS_AHEAD) for first in range(0, count, ROWS_AHEAD)]):
            found[some] = self.embed(rows, None if progress is None else _later(progress, some.start, count))
        return found

    def _tokens_of_a_batch(self) -> int:
        if self._packed is None:
            return TOKENS_PADDED
        return TOKENS_PACKED if self.model.device.type == "cpu" else TOKENS_ELSEWHERE

    def _read(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Unit vectors float32 [n, D] of rows in rising length."""
        if self._packed is not None:
            vectors = self._packed.states(rows, lambda states: pool(states, self.pooling))
        else:
            ids, lengths = pad_rows(rows, self.writer.tokens.pad)
            vectors = encode(self.model, ids.to(self.model.device), lengths.to(self.model.device), self.pooling)
        return functional.normalize(vectors[:, : self.dims].float(), dim=-1)


def pool(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """float32 [n, D] of the last hidden states [n, length, D] of rows of equal length: mean, last, or the sum."""
    last = states[:, -1].float()
    if pooling == "last":
        return last
    mean = states.sum(1, dtype=torch.float32) / states.shape[1]
    return mean if pooling == "mean" else mean + last


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


def ahead(make: Callable[[slice], list[list[int]]], parts: Sequence[slice]) -> Iterator[tuple[slice, list[list[int]]]]:
    """Each part with what was made of it, in order; the next one is made on a thread of its own while the caller works."""
    if len(parts) == 1:
        yield parts[0], make(parts[0])
        return
    with ThreadPoolExecutor(1, "tokens") as pool:
        coming = [pool.submit(make, part) for part in parts[:1]]
        for part, following in zip(parts, [*parts[1:], None]):
            rows = coming.pop().result()
            if following is not None:
                coming.append(pool.submit(make, following))
            yield part, rows


def _later(progress: Progress, before: int, count: int) -> Progress:
    return lambda done, _: progress(before + done, count)


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
    write_json(folder / FACTS, facts)
    write_modules(folder, dims, writer.budgets.member, pooling)
    return folder_fingerprint(folder, FINGERPRINTED)
