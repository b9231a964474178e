"""Step 0 of an encoder: quantizer, tokenizer and weights, new or from a checkpoint, and the batches that come next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from retrieval.data.schema import Dataset
from retrieval.device import checked_device
from retrieval.features import Kind, Quantizer
from retrieval.learn.batches import BatchSettings, Sampler
from retrieval.learn.checkpoint import DATA, TrainingError, dataset_digest
from retrieval.learn.clock import Clock
from retrieval.learn.prepare import NothingToLearn, base_tokens, fit_entries, fit_quantizer, fit_tokens
from retrieval.learn.train import LoopSettings, Trainer
from retrieval.learn.warm import warm_start
from retrieval.llama import Size, add_lora, fit_vocabulary, load_llama, new_llama, smooth_buckets
from retrieval.writer import Budgets, Writer


@dataclass(frozen=True)
class EncoderPlan:
    """All that decides the weights, apart from the data. One of `steps` and `minutes` (of the `clock`) says how long;
    `learning_rate` takes the place of the one in `loop` and of its choice on the validation window; `warm_words` starts a model
    from scratch with latent-semantic word vectors (`retrieval.learn.warm`); `fit_entries` gives history entries the room that
    the members' histories leave (`retrieval.learn.prepare`); without `validation` nothing is chosen, so steps and rate must be
    given; `quantizer` "none" leaves all numbers out of the prompts; `history` "full" shows what was not engaged, too
    (`retrieval.learn.whole`), which the service cannot. `device` decides by rounding."""

    steps: int | None = None
    minutes: float | None = 5.0
    clock: Clock = "wall"
    seed: int = 0
    base: str | None = None
    lora_rank: int | None = None
    learning_rate: float | None = None
    quantizer: Kind | Literal["none"] = "percentile"
    warm_words: bool = True
    fit_entries: bool = True
    validation: bool = True
    history: Literal["positives", "full"] = "positives"
    device: str = "cpu"
    size: Size = field(default_factory=Size)
    budgets: Budgets = field(default_factory=Budgets)
    batch: BatchSettings = field(default_factory=BatchSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)

    @property
    def rate(self) -> float:
        """The learning rate that was asked for, or the default."""
        return self.loop.learning_rate if self.learning_rate is None else self.learning_rate


def identity_of(dataset: Dataset, plan: EncoderPlan) -> dict[str, object]:
    """What a training must share with a killed one to go on from it: the plan and the data."""
    return {"plan": asdict(plan), DATA: dataset_digest(dataset)}


def start(dataset: Dataset, before: int, plan: EncoderPlan, steps: int, identity: Mapping[str, object] | None = None) -> Trainer:
    """A trainer at step 0: quantizer and tokenizer fitted before `before`, the trunk new or from the base checkpoint.

    `identity` is that of the whole training, if `dataset` and `plan` are not all there is to it. Raises DeviceMissing first.
    """
    checked_device(plan.device)
    torch.manual_seed(plan.seed)
    kind = plan.quantizer
    quantizer = Quantizer("percentile", {}) if kind == "none" else fit_quantizer(dataset, before, kind, plan.seed)
    if plan.base is None:
        tokens = fit_tokens(dataset, before, quantizer, plan.size.vocabulary)
        model: PreTrainedModel = new_llama(plan.size, len(tokens), causal_lm=False)
        if plan.warm_words:
            warm_start(model, tokens, dataset, before, plan.seed)
    else:
        tokens = base_tokens(plan.base, quantizer)
        model = load_llama(plan.base, causal_lm=False)
        fit_vocabulary(model, tokens)
        if plan.lora_rank:
            add_lora(model, plan.lora_rank)
    smooth_buckets(model, tokens, quantizer)
    budgets = fit_entries(dataset, before, plan.budgets) if plan.fit_entries else plan.budgets
    writer = Writer(tokens, quantizer, budgets, dataset.meta.retrieval_actions, plan.history == "full")
    sampler = Sampler(dataset, writer, before, plan.batch, plan.seed)
    if not sampler.runs:
        raise NothingToLearn(f"{dataset.meta.name}: no engagement before the cut; nothing to train on")
    if max(plan.loop.matryoshka, default=0) >= model.config.hidden_size:
        raise TrainingError(
            f"matryoshka lengths {plan.loop.matryoshka} must be below the model's width {model.config.hidden_size}"
        )
    settings = replace(plan.loop, learning_rate=plan.rate)
    return Trainer(model, sampler, steps, settings, identity or identity_of(dataset, plan), plan.device)
