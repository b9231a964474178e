"""Step 0 of a ranker: tokenizer, quantizer and weights, new, from a checkpoint, or with what an encoder has learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from ranking.learn.batches import GroupWriter
from ranking.learn.compare import start_to_compare
from ranking.learn.examples import GroupSettings, pools_of
from ranking.learn.loop import LoopSettings, Trainer
from ranking.prompts import RankBudgets, RankPrompts, label_token
from ranking.ranker import labels_of
from ranking.tasks import Task, tasks_of
from retrieval.data.schema import Dataset
from retrieval.encoder import FINGERPRINTED, QUANTIZER, read_facts
from retrieval.features import Kind, Quantizer
from retrieval.fingerprint import folder_fingerprint
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.prepare import base_tokens, fit_quantizer, fit_tokens
from retrieval.learn.warm import start_from_words
from retrieval.llama import Size, add_lora, fit_vocabulary, load_llama, new_llama, smooth_buckets
from retrieval.tokens import Tokens


@dataclass(frozen=True)
class RankerPlan:
    """All that decides the weights, apart from the data. One of `steps` and `minutes` says how long.

    `base` is a LLaMA checkpoint to start from (whole, or with `lora_rank` through LoRA); `encoder` is a trained encoder whose
    tokenizer, quantizer and word vectors are the start of a new model.
    """

    steps: int | None = None
    minutes: float | None = 5.0
    seed: int = 0
    base: str | None = None
    lora_rank: int | None = None
    encoder: str | None = None
    quantizer: Kind = "percentile"
    size: Size = field(default_factory=lambda: Size())
    budgets: RankBudgets = field(default_factory=RankBudgets)
    groups: GroupSettings = field(default_factory=GroupSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)


def start(dataset: Dataset, before: int, plan: RankerPlan, steps: int) -> Trainer:
    """Return a trainer at step 0 that has seen nothing at or after `before` (seconds), whatever `dataset` holds.

    Raises TrainingError if nothing can be learned, and the errors of the checkpoint, the encoder or the tokenizer.
    """
    torch.manual_seed(plan.seed)
    tasks = tasks_of(dataset)
    pools = pools_of(dataset, tasks, None, before, plan.groups, plan.seed)
    if not pools:
        raise TrainingError(f"{dataset.meta.name}: no labelled event, impression or engagement before the cut; nothing to learn")
    model, tokens, quantizer = _parts(dataset, before, plan, tasks)
    writer = GroupWriter(dataset, RankPrompts(tokens, quantizer, plan.budgets), tasks, before)
    return Trainer(model, writer, pools, labels_of(tokens, tasks), steps, plan.loop, plan.seed)


def encoder_fingerprint(plan: RankerPlan) -> str | None:
    """The fingerprint of the encoder that the plan starts from, None without one. Raises EncoderError, MissingPart."""
    if plan.encoder is None:
        return None
    read_facts(Path(plan.encoder))
    return folder_fingerprint(Path(plan.encoder), FINGERPRINTED)


def _parts(
    dataset: Dataset, before: int, plan: RankerPlan, tasks: Mapping[str, Task]
) -> tuple[LlamaForCausalLM, Tokens, Quantizer]:
    """The causal LM, its tokenizer and its quantizer."""
    words = list(dict.fromkeys(word for task in tasks.values() for word in (task.positive, task.negative)))
    if plan.base is not None and plan.encoder is not None:
        raise TrainingError("both a base checkpoint and an encoder were given to start from; choose one")
    if plan.encoder is not None:
        encoder_fingerprint(plan)
        folder = Path(plan.encoder)
        tokens, quantizer = Tokens.load(folder), Quantizer.load(folder / QUANTIZER)
        tokens.add(_missing(tokens, words))
        vectors = load_llama(folder, causal_lm=False).get_input_embeddings().weight
        return _new(plan.size, tokens, quantizer, tasks, vectors), tokens, quantizer
    quantizer = fit_quantizer(dataset, before, plan.quantizer, plan.seed)
    if plan.base is None:
        tokens = fit_tokens(dataset, before, quantizer, plan.size.vocabulary, tuple(map(label_token, words)))
        known = _causal(new_llama(plan.size, len(tokens), causal_lm=True), "a new model")
        smooth_buckets(known, tokens, quantizer)
        start_from_words(known, tokens, dataset, before, plan.seed)
        return _new(plan.size, tokens, quantizer, tasks, known.get_input_embeddings().weight), tokens, quantizer
    tokens = base_tokens(plan.base, quantizer)
    tokens.add(_missing(tokens, words))
    model = _causal(load_llama(plan.base, causal_lm=True), plan.base)
    fit_vocabulary(model, tokens)
    smooth_buckets(model, tokens, quantizer)
    if plan.lora_rank:
        add_lora(model, plan.lora_rank)
    return model, tokens, quantizer


def _new(size: Size, tokens: Tokens, quantizer: Quantizer, tasks: Mapping[str, Task], vectors: Tensor) -> LlamaForCausalLM:
    """A new causal LM that knows its words from `vectors` and compares them from the first step, if its shape has room."""
    model = _causal(new_llama(size, len(tokens), causal_lm=True), "a new model")
    if not start_to_compare(model, tokens, vectors, labels_of(tokens, tasks)):
        smooth_buckets(model, tokens, quantizer)
    return model


def _missing(tokens: Tokens, words: list[str]) -> list[str]:
    """Special tokens for the answer words that this tokenizer does not have as one token."""
    return [label_token(word) for word in words if len(tokens.text_ids(word)) != 1]


def _causal(model: PreTrainedModel, name: str) -> LlamaForCausalLM:
    if not isinstance(model, LlamaForCausalLM):
        raise TrainingError(f"{name}: {type(model).__name__} cannot rank yet; expected a LlamaForCausalLM checkpoint")
    return model
