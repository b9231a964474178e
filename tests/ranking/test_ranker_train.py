"""Training sees only the past, reads what serving will read, and learns a planted rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.calibrate import auc
from ranking.learn import train as training
from ranking.learn.attention import flash_mixer
from ranking.learn.batches import GroupWriter, Order
from ranking.learn.examples import SAMPLED, GroupSettings, pools_of
from ranking.learn.loop import LoopSettings, TrainingError
from ranking.learn.start import RankerPlan, start
from ranking.learn.train import judge, train_ranker
from ranking.prefill.attend import reference
from ranking.prefill.llama import Layers, cascade
from ranking.prefill.plan import Limits, Request, plan
from ranking.prompts import RankBudgets, RankPrompts, relations_of
from ranking.ranker import Ranker
from ranking.tasks import tasks_of
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset
from retrieval.data.write import write_dataset
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.records import ItemWords, records_of, view_of
from retrieval.tokens import Tokens

SMALL = RankerPlan(
    steps=3,
    minutes=None,
    size=Size(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    budgets=RankBudgets(item=48, prefix=160),
    loop=LoopSettings(learning_rate=5e-3, candidates=48),
)


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
    return RankPrompts(tiny_tokens, tiny_quantizer, SMALL.budgets)


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


def test_training_learns_the_planted_rule(tiny_dataset: Dataset) -> None:
    settings = replace(SMALL, steps=70, loop=replace(SMALL.loop, others=0.2))
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, settings, 70)
    pools = pools_of(tiny_dataset, trainer.writer.tasks, tiny_dataset.meta.cut_test, 1 << 60, settings.groups, 0)
    writer = GroupWriter(tiny_dataset, trainer.writer.prompts, trainer.writer.tasks, 1 << 60)
    before = auc(*judge(trainer, writer, pools)["label"])
    trainer.run(70)
    losses = [point["loss"] for point in trainer.curve]
    assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:8])
    after = judge(trainer, writer, pools)
    assert auc(*after["label"]) > max(0.8, before + 0.1)
    assert auc(*after["like"]) > 0.75


def test_equal_steps_and_seed_give_equal_weights_also_after_a_kill(tiny_dataset: Dataset, tmp_path: Path) -> None:
    cut = tiny_dataset.meta.cut_test
    whole = start(tiny_dataset, cut, SMALL, 4)
    whole.run(4)
    halfway = start(tiny_dataset, cut, SMALL, 4)
    halfway.run(2)
    halfway.save(tmp_path)
    resumed = start(tiny_dataset, cut, SMALL, 4)
    assert not resumed.resume(tmp_path / "nothing")
    assert resumed.resume(tmp_path)
    resumed.run(4)
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, two), name
    assert [point["loss"] for point in whole.curve] == [point["loss"] for point in resumed.curve]
    other = start(tiny_dataset, cut, replace(SMALL, seed=1), 4)
    with pytest.raises(TrainingError, match="another plan"):
        other.resume(tmp_path)


@pytest.fixture(scope="module")
def trained(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, training.TrainReport]:
    out = tmp_path_factory.mktemp("trained") / "ranker"
    return out, train_ranker(tiny_dataset, out, SMALL)


def test_a_training_leaves_a_complete_folder_and_says_what_it_reached(
    trained: tuple[Path, training.TrainReport], tiny_dataset: Dataset
) -> None:
    out, report = trained
    ranker = Ranker.load(out)
    assert ranker.fingerprint == report.fingerprint and report.steps == 3
    assert list(ranker.tasks) == report.tasks == ["label", "like"]
    assert 0 < report.validation["label"]["auc"] < 1 and ranker.facts.encoder is None
    assert ranker.facts.calibrators["label"].n == report.validation["label"]["candidates"]
    assert not (out / "training" / "checkpoint").exists()
    with pytest.raises(TrainingError, match="already holds a ranker"):
        train_ranker(tiny_dataset, out, SMALL)


def test_the_same_training_gives_the_same_fingerprint(
    trained: tuple[Path, training.TrainReport], tiny_dataset: Dataset, tmp_path: Path
) -> None:
    assert train_ranker(tiny_dataset, tmp_path / "again", SMALL).fingerprint == trained[1].fingerprint


def test_minutes_become_steps_that_reproduce_the_weights(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_affordable", lambda *_: 3)
    by_time = train_ranker(tiny_dataset, tmp_path / "time", replace(SMALL, steps=None, minutes=0.1))
    by_steps = train_ranker(tiny_dataset, tmp_path / "steps", replace(SMALL, steps=by_time.steps))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("time", "steps")]
    assert weights[0] == weights[1] and by_steps.steps == by_time.steps


@pytest.mark.parametrize("lora", [None, 2])
def test_a_checkpoint_is_a_start(
    trained: tuple[Path, training.TrainReport], tiny_dataset: Dataset, tmp_path: Path, lora: int | None
) -> None:
    plan = replace(SMALL, base=str(trained[0]), lora_rank=lora, loop=replace(SMALL.loop, learning_rate=1e-3))
    report = train_ranker(tiny_dataset, tmp_path / "ranker", plan)
    ranker = Ranker.load(tmp_path / "ranker")
    held, first = (dict(model.named_parameters()) for model in (ranker.engine.model, Ranker.load(trained[0]).engine.model))
    assert held.keys() == first.keys()
    moved = held["model.layers.0.mlp.up_proj.weight"] - first["model.layers.0.mlp.up_proj.weight"]
    assert 0 < moved.abs().max() < 0.05
    assert torch.linalg.matrix_rank(moved) <= lora if lora else report.parameters > 0


def test_an_encoder_is_a_start_and_its_fingerprint_is_kept(tiny_dataset: Dataset, tmp_path: Path) -> None:
    from retrieval.encoder import save_encoder
    from retrieval.learn.fit import EncoderPlan
    from retrieval.learn.fit import start as start_encoder

    size = replace(SMALL.size, layers=1)
    encoder = start_encoder(tiny_dataset, tiny_dataset.meta.cut_test, EncoderPlan(steps=1, size=size), 1)
    fingerprint = save_encoder(tmp_path / "encoder", encoder.model, encoder.sampler.writer, {})
    plan = replace(SMALL, encoder=str(tmp_path / "encoder"))
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 1)
    own = trainer.model.model.embed_tokens.weight[: encoder.model.embed_tokens.num_embeddings]
    assert torch.equal(own, encoder.model.embed_tokens.weight)
    assert torch.equal(trainer.model.model.layers[0].mlp.up_proj.weight, encoder.model.layers[0].mlp.up_proj.weight)
    train_ranker(tiny_dataset, tmp_path / "ranker", plan)
    assert Ranker.load(tmp_path / "ranker").facts.encoder == fingerprint
    with pytest.raises(TrainingError, match="choose one"):
        start(tiny_dataset, tiny_dataset.meta.cut_test, replace(plan, base="x"), 1)


def test_engagements_alone_are_compared_with_random_items(tiny_dataset: Dataset, tmp_path: Path) -> None:
    likes = tiny_dataset.engagements
    bare = replace(tiny_dataset, events=replace(likes, label=np.full(len(likes), -1, np.int8)), connections=None)
    pool = pools_of(bare, tasks_of(bare), None, bare.meta.cut_test, GroupSettings(), 0)["engage"]
    drawn = pool.event == SAMPLED
    assert 2.5 < drawn.sum() / (~drawn).sum() <= 4
    np.testing.assert_array_equal(pool.label == 0, drawn)
    owner = np.repeat(pool.member, np.diff(pool.start))
    known = set(zip(likes.member.tolist(), likes.item.tolist()))
    assert not known & set(zip(owner[drawn].tolist(), pool.item[drawn].tolist()))
    assert "no rates" in train_ranker(bare, tmp_path / "ranker", SMALL).note


def test_a_folder_without_interactions_says_so(tiny_dataset: Dataset, tmp_path: Path) -> None:
    nothing = replace(tiny_dataset, events=tiny_dataset.events.take(np.zeros(0, np.int64)), connections=None)
    report = train_ranker(nothing, tmp_path / "ranker", SMALL)
    assert "no interactions" in report.note
    assert list(Ranker.load(tmp_path / "ranker").tasks) == ["engage"]


def test_nothing_before_the_cut_is_an_error(tiny_dataset: Dataset, tmp_path: Path) -> None:
    late = replace(tiny_dataset, meta=replace(tiny_dataset.meta, cut_valid=0, cut_test=0))
    with pytest.raises(BrewlineError, match="nothing to learn"):
        train_ranker(late, tmp_path / "ranker", SMALL)


def test_the_command_trains_and_prints_one_object(tiny_dataset: Dataset, tmp_path: Path) -> None:
    from ranking.cli.ranker import app

    write_dataset(tiny_dataset, tmp_path / "data")
    out = tmp_path / "ranker"
    result = CliRunner().invoke(app, ["train", str(tmp_path / "data"), "--out", str(out), "--steps", "1", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["steps"] == 1 and printed["fingerprint"] == Ranker.load(out).fingerprint
    both = CliRunner().invoke(app, ["train", str(tmp_path / "data"), "--out", str(out), "--steps", "1", "--minutes", "1"])
    assert isinstance(both.exception, TrainingError)
