"""Step 0 of a ranker: tokenizer, quantizer and weights, new, from a checkpoint, or with what an encoder has learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from ranking.calibrate import Method
from ranking.learn.batches import GroupWriter
from ranking.learn.compare import start_to_compare
from ranking.learn.examples import GroupSettings, pools_of, taught, thinned
from ranking.learn.loop import LoopSettings, Trainer
from ranking.learn.positions import PositionSettings, places_of
from ranking.learn.variety import Variety
from ranking.prompts import RankBudgets, RankLayout, RankPrompts, label_token
from ranking.ranker import labels_of
from ranking.shots_past import PastShots
from ranking.tasks import Task, tasks_of, taught_of
from retrieval.data.schema import Dataset
from retrieval.encoder import FACTS, QUANTIZER, VALIDATION, read_facts, stored_fingerprint
from retrieval.features import Kind, Quantizer
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.prepare import base_tokens, fit_quantizer, fit_tokens
from retrieval.learn.warm import start_from_words
from retrieval.llama import Size, add_lora, fit_vocabulary, load_llama, new_llama, smooth_buckets
from retrieval.provenance import check_provenance, saw_past
from retrieval.tokens import Tokens

Held = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RankerPlan:
    """All that decides the weights, apart from the data. One of `steps` and `minutes` says how long.

    `base` is a LLaMA checkpoint to start from (whole, or with `lora_rank` through LoRA); `encoder` is a trained encoder whose
    tokenizer, quantizer and word vectors are the start of a new model. `learning_rate` takes the
    place of the one in `loop` and of its choice on the validation window. `fusion`: a head with numbers is trained after it.
    `tasks` take the place of those that the folder can teach. `wishes` is the share of groups with an instruction made by rule
    (`ranking.learn.wishes`); cold members get `shots` examples. `positions`: see `ranking.learn.positions`.
    `share` of the groups are learned from, for scaling curves (late fusion's trees still read all events).
    """

    steps: int | None = None
    minutes: float | None = 5.0
    seed: int = 0
    learning_rate: float | None = None
    base: str | None = None
    lora_rank: int | None = None
    encoder: str | None = None
    calibration: Method = "platt"
    fusion: bool = True
    quantizer: Kind = "percentile"
    size: Size = field(default_factory=lambda: Size())
    budgets: RankBudgets = field(default_factory=RankBudgets)
    groups: GroupSettings = field(default_factory=GroupSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    layout: RankLayout = field(default_factory=RankLayout)
    tasks: tuple[Task, ...] = ()
    wishes: float = 0.0
    shots: int = 0
    positions: PositionSettings = field(default_factory=PositionSettings)
    share: float = 1.0

    @property
    def named_tasks(self) -> dict[str, Task]:
        """The tasks that were asked for, by name."""
        return {task.name: task for task in self.tasks}

    @property
    def rate(self) -> float:
        """The learning rate that was asked for, or the default."""
        return self.loop.learning_rate if self.learning_rate is None else self.learning_rate


def start(
    dataset: Dataset,
    before: int,
    plan: RankerPlan,
    steps: int,
    identity: Mapping[str, object] | None = None,
    held: Held | None = None,
) -> Trainer:
    """Return a trainer at step 0 that has seen nothing at or after `before` (seconds), whatever `dataset` holds.

    Events of the members `held` (bool [M]) between the cuts are not learned from. `identity` is what its checkpoints must share.
    Raises TrainingError if nothing can be learned, and the errors of the checkpoint, the encoder or the tokenizer.
    """
    torch.manual_seed(plan.seed)
    tasks = plan.named_tasks or tasks_of(replace(dataset, events=dataset.events.before(before)))
    pools = pools_of(dataset, taught_of(tasks), None, before, plan.groups, plan.seed)
    if not pools:
        raise TrainingError(f"{dataset.meta.name}: no labelled event, impression or engagement before the cut; nothing to learn")
    if held is not None:
        pools = taught(dataset, pools, held)
    pools, corrections = thinned(pools, tasks, plan.groups.rare, plan.seed)
    if plan.share < 1:
        pools = {name: pool.only(_some(len(pool), plan.share, plan.seed)) for name, pool in pools.items()}
    past = PastShots(dataset, taught_of(tasks), plan.shots, before)
    model, tokens, quantizer = _parts(dataset, before, plan, tasks)
    prompts = RankPrompts(tokens, quantizer, plan.budgets, plan.layout, past.of_all(tasks, before))
    writer = GroupWriter(dataset, prompts, tasks, before, past)
    return Trainer(
        model,
        writer,
        pools,
        labels_of(tokens, tasks),
        steps,
        replace(plan.loop, learning_rate=plan.rate),
        identity or {},
        plan.seed,
        Variety(dataset.items, tasks, plan.wishes, plan.seed, corrections),
        places_of(dataset, pools, tasks, plan.positions),
    )


def _some(groups: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """A share of the groups, one at least; those of a smaller share are among those of a larger one."""
    order = np.random.default_rng([seed, 14]).permutation(groups)
    return order < max(1, round(share * groups))


@dataclass(frozen=True)
class Origins:
    """The encoder that each run starts from, settled once before anything is trained: its fingerprint in the refit, and the
    folder and fingerprint in the validation run (None: that run starts without one)."""

    refit: str | None = None
    validation_folder: str | None = None
    validation: str | None = None


def origins_of(dataset: Dataset, plan: RankerPlan) -> Origins:
    """The encoders of a training. The validation run takes one that saw nothing at or after its cut: the twin that an encoder
    training leaves in its folder, or the encoder itself where that is so.

    Raises TrainedTooLate, EncoderError, MissingPart.
    """
    if plan.encoder is None:
        return Origins()
    folder, cut = Path(plan.encoder), dataset.meta.cut_valid
    check_provenance(folder, read_facts(folder).get("training", {}), dataset)
    complete = [each for each in (folder / VALIDATION, folder) if (each / FACTS).is_file()]
    blind = next((each for each in complete if not saw_past(read_facts(each).get("training", {}), dataset, cut)), None)
    if blind is None:
        return Origins(stored_fingerprint(folder))
    return Origins(stored_fingerprint(folder), str(blind), stored_fingerprint(blind))


def _parts(
    dataset: Dataset, before: int, plan: RankerPlan, tasks: Mapping[str, Task]
) -> tuple[LlamaForCausalLM, Tokens, Quantizer]:
    """The causal LM, its tokenizer and its quantizer."""
    words = list(dict.fromkeys(word for task in tasks.values() for word in (task.positive, task.negative)))
    if plan.base is not None and plan.encoder is not None:
        raise TrainingError("both a base checkpoint and an encoder were given to start from; choose one")
    if plan.encoder is not None:
        folder = Path(plan.encoder)
        read_facts(folder)
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
