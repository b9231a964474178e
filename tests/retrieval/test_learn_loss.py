"""Losses against sums written out, and ways to compute one that must not change it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional

from retrieval.data.schema import Dataset
from retrieval.encoder import Pooling, encode, length_batches
from retrieval.learn.batches import Batch, BatchSettings
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.loss import Match, binary, info_nce, look_alikes, objective
from retrieval.learn.settings import PLACES, plan_of
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.train import LoopSettings, Trainer
from retrieval.llama import Size, pad_rows

PLAN = EncoderPlan(
    size=Size(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
    loop=LoopSettings(pooling="mean"),
)


class Plain(Trainer):
    """The step as it was before it had settings: one pass per chunk, mean pooling, InfoNCE, nothing else."""

    def loss(self, batch: Batch) -> torch.Tensor:
        members, items = [], []
        for chunk in length_batches([len(row) for row in batch.member_rows], 4_096):
            running = self._read(batch.member_rows, chunk).cumsum(1)
            mine = np.flatnonzero(np.isin(batch.owner, chunk))
            rows = torch.tensor([chunk.tolist().index(row) for row in batch.owner[mine].tolist()])
            prefix = torch.from_numpy(batch.prefix[mine])
            members.append((mine, running[rows, prefix - 1] / prefix[:, None]))
        for chunk in length_batches([len(row) for row in batch.item_rows], 4_096):
            hidden, length = self._read(batch.item_rows, chunk), torch.tensor([len(batch.item_rows[row]) for row in chunk])
            real = torch.arange(hidden.shape[1])[None, :] < length[:, None]
            items.append((chunk, (hidden * real[..., None]).sum(1) / length[:, None]))
        states, vectors = (
            functional.normalize(
                torch.cat([part for _, part in parts])[np.argsort(np.concatenate([at for at, _ in parts]))], dim=-1
            )
            for parts in (members, items)
        )
        known = (torch.from_numpy(part) for part in (batch.positive, batch.log_q, batch.hidden))
        return info_nce(states, vectors, *known, self.log_scale.exp())

    def _read(self, rows: list[list[int]], chunk: np.ndarray) -> torch.Tensor:
        ids, _ = pad_rows([rows[row] for row in chunk], self.sampler.writer.tokens.pad)
        return self.model(input_ids=ids, use_cache=False).last_hidden_state.float()


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([trainer.log_scale.detach()[None], *(weight.detach().flatten() for weight in trainer.model.parameters())])


def gradients(dataset: Dataset, **settings: object) -> tuple[float, torch.Tensor]:
    """The loss of the first batch and its gradient, with short passes so that there are several."""
    loop = replace(LoopSettings(forward_tokens=300), **settings)  # type: ignore[arg-type]
    trainer = start(dataset, dataset.meta.cut_test, replace(PLAN, loop=loop), 10)
    trainer.model.train()
    loss = trainer.loss(trainer.sampler.batch(0))
    loss.backward()
    found = [trainer.log_scale, *trainer.model.parameters()]
    return float(loss.detach()), torch.cat([weight.grad.flatten() for weight in found if weight.grad is not None])


def test_defaults_give_the_weights_of_the_plain_step_bit_for_bit(tiny_dataset: Dataset) -> None:
    ours, plain = (start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 6) for _ in range(2))
    plain = Plain(plain.model, plain.sampler, 6, plain.settings, {}, plain.model.device)
    for trainer in (ours, plain):
        trainer.run(6)
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("way", [{"cached": True}, {"recompute": True}, {"cached": True, "recompute": True}])
def test_what_saves_memory_changes_no_gradient(tiny_dataset: Dataset, way: dict[str, bool]) -> None:
    (loss, whole), (again, spared) = gradients(tiny_dataset), gradients(tiny_dataset, **way)
    assert loss == again and torch.equal(whole, spared)


def test_cached_passes_hold_one_pass_at_a_time(tiny_dataset: Dataset) -> None:
    """Bytes that the graph keeps for the backward pass: with caching only vectors, whatever the batch."""
    kept = {}
    for cached in (False, True):
        loop = LoopSettings(forward_tokens=300, cached=cached)
        trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, replace(PLAN, loop=loop), 10)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            trainer.loss(trainer.sampler.batch(0))
        kept[cached] = sum(sizes)
    assert kept[True] < kept[False] / 20


def test_bf16_is_near_and_is_not_float32(tiny_dataset: Dataset) -> None:
    (loss, whole), (near, rough) = gradients(tiny_dataset), gradients(tiny_dataset, precision="bf16")
    assert loss != near and near == pytest.approx(loss, rel=0.02)
    assert functional.cosine_similarity(whole, rough, dim=0) > 0.98


def drawn(targets: int = 3, columns: int = 6) -> tuple[torch.Tensor, torch.Tensor, Match, torch.Tensor]:
    torch.manual_seed(0)
    states, items = (functional.normalize(torch.randn(n, 8), dim=-1) for n in (targets, columns))
    hidden = torch.zeros(targets, columns, dtype=torch.bool)
    hidden[0, 4] = True
    return states, items, Match(torch.tensor([1, 3, 0]), torch.log(torch.rand(columns)), hidden), torch.tensor(5.0)


def test_binary_equals_the_sum_written_out() -> None:
    states, items, match, scale = drawn()
    expected = 0.0
    for target, own in enumerate(match.positive.tolist()):
        for column in range(len(items)):
            logit = float(scale * states[target] @ items[column] - match.log_q[column])
            chance = 1 / (1 + np.exp(-logit))
            if column == own:
                expected -= np.log(chance) / 3
            elif not match.hidden[target, column]:
                expected -= np.log(1 - chance) / 3
    found = binary(states, items, match.positive, match.log_q, match.hidden, scale)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_look_alikes_are_no_negatives_and_the_target_always_competes() -> None:
    states, items, match, scale = drawn()
    items = items.clone()
    items[5] = items[1]
    found = look_alikes(items, match.positive, 0.999)
    assert found.nonzero().tolist() == [[0, 5]]
    masked = objective(states, items, match, scale, "infonce", 0.999, ())
    without = replace(match, hidden=match.hidden | found)
    assert torch.equal(masked, objective(states, items, without, scale, "infonce", None, ()))
    assert masked < objective(states, items, match, scale, "infonce", None, ())


@pytest.mark.parametrize("kind", ["infonce", "bce"])
def test_matryoshka_adds_the_loss_of_each_front_made_unit(kind: str) -> None:
    states, items, match, scale = drawn()
    judge, known = (info_nce if kind == "infonce" else binary), (match.positive, match.log_q, match.hidden, scale)
    expected = judge(states, items, *known)
    for dims in (2, 4):
        fronts = (vectors[:, :dims] / vectors[:, :dims].norm(dim=1, keepdim=True) for vectors in (states, items))
        expected = expected + judge(*fronts, *known)
    torch.testing.assert_close(objective(states, items, match, scale, kind, None, (2, 4)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_what_is_pooled_of_a_prefix_is_what_the_encoder_reads(tiny_dataset: Dataset, pooling: Pooling) -> None:
    plan = replace(PLAN, loop=LoopSettings(pooling=pooling))
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 10)
    batch, pad = trainer.sampler.batch(0), trainer.sampler.writer.tokens.pad
    rows = [batch.member_rows[row][:end] for row, end in zip(batch.owner.tolist(), batch.prefix.tolist())]
    with torch.no_grad():
        torch.testing.assert_close(trainer._member_states(batch), encode(trainer.model, *pad_rows(rows, pad), pooling))
        torch.testing.assert_close(trainer._item_vectors(batch), encode(trainer.model, *pad_rows(batch.item_rows, pad), pooling))


def test_flat_settings_reach_their_places_and_wrong_ones_are_named() -> None:
    assert plan_of({}) == EncoderPlan()
    plan = plan_of({"loss": "bce", "matryoshka": [8, 16], "hidden": 64, "history_tokens": 400, "hard": 2, "numbers": "none"})
    assert plan.loop.loss == "bce" and plan.loop.matryoshka == (8, 16) and plan.size.mlp == 192
    assert plan.budgets.member == 400 and plan.batch.hard == 2 and plan.quantizer == "none"
    for name in PLACES:
        with pytest.raises(TrainingError, match=f"setting {name} is "):
            plan_of({name: {"no": "such"}})
    with pytest.raises(TrainingError, match="unknown settings lose; known are base, cached,"):
        plan_of({"lose": "bce"})
    with pytest.raises(TrainingError, match=r"matryoshka \(expected lengths below the model's width"):
        plan_of({"matryoshka": [128]})
