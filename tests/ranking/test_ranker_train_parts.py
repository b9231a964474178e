"""The pieces of a training: the gradient, the groups, what they read, and the first weights of a new model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ranking.learn.attention import flash_mixer
from ranking.learn.batches import GroupWriter, Order
from ranking.learn.compare import start_to_compare
from ranking.learn.examples import GroupSettings, pools_of
from ranking.prefill.attend import reference
from ranking.prefill.engine import Engine
from ranking.prefill.llama import Layers, cascade
from ranking.prefill.plan import plan
from ranking.prefill.request import Limits, Request
from ranking.prompts import RankBudgets, RankPrompts, relations_of
from ranking.tasks import tasks_of
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.records import ItemWords, records_of, view_of
from retrieval.tokens import Tokens


def dense_mask(requests: list[Request]) -> tuple[list[int], list[int], torch.Tensor, list[int]]:
    """Tokens, positions, a full T x T mask and the answers' rows of requests packed one after the other."""
    tokens: list[int] = []
    positions: list[int] = []
    owner: list[tuple[int, int]] = []
    answers: list[int] = []
    for number, request in enumerate(requests):
        for item, part in enumerate([request.prefix, *request.items]):
            begin = len(request.prefix) if item else 0
            tokens += part
            positions += range(begin, begin + len(part))
            owner += [(number, item)] * len(part)
            if item:
                answers.append(len(tokens) - 1)
    size = len(tokens)
    mask = torch.full((size, size), float("-inf"))
    for row in range(size):
        for column in range(row + 1):
            if owner[row] == owner[column] or (owner[column] == (owner[row][0], 0)):
                mask[row, column] = 0
    return tokens, positions, mask, answers


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_the_gradient_equals_the_dense_masks(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = new_llama(Size(hidden=32, layers=3, heads=heads[0], kv_heads=heads[1], mlp=48), 60, causal_lm=True)
    assert isinstance(model, LlamaForCausalLM)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    rng = np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, 60, size).tolist(), [rng.integers(0, 60, n).tolist() for n in lengths])
        for size, lengths in ((11, (3, 5, 3, 1)), (4, (2, 2)))
    ]
    tokens, positions, mask, answers = dense_mask(requests)
    out = model.model(
        input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]), attention_mask=mask[None, None], use_cache=False
    )
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1))
    (out.last_hidden_state[0, answers] @ weight).square().sum().backward()
    wanted = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    planned = plan(requests, Limits(max_tokens=10_000), hoist=False)
    for mixer in (flash_mixer, cascade(reference)):
        model.zero_grad()
        hidden = Layers(model, mixer).read(planned.chunks[0], {})
        rows = torch.from_numpy(np.concatenate([np.argsort(planned.chunks[0].unique)[fan] for fan in planned.fan_out]))
        (hidden[rows] @ weight).square().sum().backward()
        assert wanted.keys() == {name for name, value in model.named_parameters() if value.grad is not None}
        for name, value in model.named_parameters():
            if value.grad is not None:
                torch.testing.assert_close(value.grad, wanted[name], atol=1e-3, rtol=1e-4)


def test_groups_cover_every_answer_once_and_respect_their_bounds(tiny_dataset: Dataset) -> None:
    settings = GroupSettings(least=6, most=10)
    log = tiny_dataset.events
    pools = pools_of(tiny_dataset, tasks_of(tiny_dataset), None, tiny_dataset.meta.cut_test, settings, 0)
    pool = pools["label"]
    wanted = np.flatnonzero((log.label >= 0) & (log.timestamp < tiny_dataset.meta.cut_test))
    np.testing.assert_array_equal(np.sort(pool.event), wanted)
    np.testing.assert_array_equal(pool.label, log.label[pool.event])
    np.testing.assert_array_equal(pool.day, log.day[pool.event])
    assert np.diff(pool.start).max() <= 10
    for group in range(len(pool)):
        event = pool.event[pool.candidates(group)]
        assert set(log.member[event]) == {pool.member[group]}
        assert pool.moment[group] == log.timestamp[event].min()
    window = pools_of(tiny_dataset, tasks_of(tiny_dataset), tiny_dataset.meta.cut_valid, tiny_dataset.meta.cut_test, settings, 0)
    assert log.timestamp[window["label"].event].min() >= tiny_dataset.meta.cut_valid


@pytest.fixture(scope="module")
def prompts(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> RankPrompts:
    return RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(item=48, prefix=160))


def test_training_writes_what_serving_writes(tiny_dataset: Dataset, prompts: RankPrompts) -> None:
    tasks, cut = tasks_of(tiny_dataset), tiny_dataset.meta.cut_test
    writer = GroupWriter(tiny_dataset, prompts, tasks, cut)
    words = ItemWords(tiny_dataset.items)
    records = {moment: list(records_of(tiny_dataset, moment)) for moment in (cut - 2 * DAY, cut)}
    for moment, members in records.items():
        for member in range(0, 40, 9):
            view = view_of(members[member], words)
            assert writer.prefix(member, moment, tasks["like"]) == prompts.prefix(view, tasks["like"])
            creators = [tiny_dataset.items.creator[row] for row in range(20)]
            assert writer.relations(member, np.arange(20), moment) == relations_of(view.connections, creators)
    numbers = Counts.from_dataset(tiny_dataset).as_of(cut)
    served = prompts.items([tiny_dataset.items[row] for row in range(60)], numbers)
    assert writer.item_rows(np.arange(60), np.full(60, cut // DAY)) == served


def test_a_group_never_sees_its_own_moment_or_later(tiny_dataset: Dataset, prompts: RankPrompts) -> None:
    tasks, cut = tasks_of(tiny_dataset), tiny_dataset.meta.cut_valid
    pools = pools_of(tiny_dataset, tasks, None, cut, GroupSettings(), 0)
    whole = GroupWriter(tiny_dataset, prompts, tasks, 1 << 60)
    rng = np.random.default_rng(0)
    for group in rng.integers(0, len(pools["label"]), 12).tolist():
        moment = int(pools["label"].moment[group])
        past = replace(tiny_dataset, events=tiny_dataset.events.before(moment - moment % DAY))
        history = replace(tiny_dataset, events=tiny_dataset.events.before(moment))
        seen = whole.write(pools, [("label", group)])
        member = int(pools["label"].member[group])
        assert seen.requests[0].prefix == GroupWriter(history, prompts, tasks, 1 << 60).prefix(member, moment, tasks["label"])
        part = pools["label"].candidates(group)
        same_day = pools["label"].day[part] == moment // DAY
        rows = GroupWriter(past, prompts, tasks, 1 << 60).item_rows(pools["label"].item[part], pools["label"].day[part])
        for item, row, today in zip(seen.requests[0].items, rows, same_day):
            assert not today or item[: len(row)] == row


def test_every_round_shows_each_group_of_the_main_task_once(tiny_dataset: Dataset) -> None:
    pools = pools_of(tiny_dataset, tasks_of(tiny_dataset), None, tiny_dataset.meta.cut_valid, GroupSettings(), 0)
    order = Order(pools, 0.25, 48, seed=3)
    seen: list[tuple[str, int]] = []
    while order.cursor[0] == 0:
        seen += order.next()
    main = [group for task, group in seen if task == "label"]
    assert sorted(main[: len(pools["label"])]) == list(range(len(pools["label"])))
    again = Order(pools, 0.25, 48, seed=3)
    again.cursor = order.cursor
    assert again.next() == order.next()
    assert Order(pools, 0.25, 48, seed=4).next() != Order(pools, 0.25, 48, seed=3).next()


def test_a_new_model_prefers_an_item_of_the_historys_topic(tiny_tokens: Tokens) -> None:
    torch.manual_seed(0)
    model = new_llama(Size(), len(tiny_tokens), causal_lm=True)
    assert isinstance(model, LlamaForCausalLM)
    pair = (tiny_tokens.id("<|yes|>"), tiny_tokens.id("<|no|>"))
    topic = torch.arange(len(tiny_tokens)) % 4
    vectors = torch.randn(4, 100)[topic] + torch.randn(len(tiny_tokens), 100)
    assert start_to_compare(model, tiny_tokens, vectors, {"label": pair})
    special = {tiny_tokens.id(token) for token in tiny_tokens.special}
    words = [token for token in range(len(tiny_tokens)) if token not in special]
    item, answer, history = (tiny_tokens.id(token) for token in ("<|item|>", "<|answer|>", "<|history|>"))
    engine, rng = Engine(model, pair), np.random.default_rng(0)
    wins = []
    for _ in range(20):
        drawn = rng.permutation(words).tolist()
        own, other = ([word for word in drawn if topic[word] == number] for number in rng.permutation(4)[:2])
        items = [[item, *own[:6], answer], [item, *other[:6], answer]]
        (logits,) = engine.score([Request([history, *own[20:50], *drawn[:20]], items)])
        scores = logits[:, 0] - logits[:, 1]
        wins.append(scores[0] > scores[1])
    assert np.mean(wins) >= 0.9


@pytest.mark.parametrize("size", [Size(layers=1), Size(heads=4, kv_heads=4), Size(mlp=64)])
def test_a_shape_without_room_starts_as_usual(tiny_tokens: Tokens, size: Size) -> None:
    model = new_llama(size, len(tiny_tokens), causal_lm=True)
    assert isinstance(model, LlamaForCausalLM)
    before = model.get_input_embeddings().weight.clone()
    pair = (tiny_tokens.id("<|yes|>"), tiny_tokens.id("<|no|>"))
    assert not start_to_compare(model, tiny_tokens, torch.randn(len(tiny_tokens), 8), {"label": pair})
    assert torch.equal(before, model.get_input_embeddings().weight)
