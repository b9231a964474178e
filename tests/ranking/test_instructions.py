"""Members' own instructions: the rule that makes answers, where training draws them, and what the measurement measures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ranking.instructions import CONDITIONS, List, NoCategories, _moved, follow
from ranking.learn import variety
from ranking.learn.loop import LoopSettings
from ranking.learn.start import RankerPlan, start
from ranking.learn.train import train_ranker
from ranking.learn.wishes import HELD_OUT, KINDS, TAUGHT, Wish, answers_with, drawn, words_of
from ranking.prompts import RankBudgets, RankPrompts
from ranking.ranker import Ranker, RankerFacts, labels_of, save_ranker
from ranking.tasks import tasks_of
from retrieval.data.schema import Dataset, MemberView
from retrieval.data.write import write_dataset
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens

CATEGORY, CREATOR = ["a", "a", "b", "c"], ["x", "y", "x", "y"]
LABEL = np.array([1, 0, 1, 0], np.int8)


@pytest.mark.parametrize(
    ("wishes", "wanted"),
    [
        ([Wish("more", "a")], [1, 0.5, 1, 0]),
        ([Wish("less", "a")], [0.5, 0, 1, 0]),
        ([Wish("no", "b")], [1, 0, 0, 0]),
        ([Wish("only", "a")], [1, 0.5, 0, 0]),
        ([Wish("only", "y", "creator")], [0, 0.5, 0, 0.5]),
        ([Wish("more", "c"), Wish("no", "a")], [0, 0, 1, 0.5]),
        ([Wish("no", "a"), Wish("more", "a")], [0, 0, 1, 0]),
        ([Wish("more", "z")], [1, 0, 1, 0]),
        ([], [1, 0, 1, 0]),
    ],
)
def test_answers_follow_the_stated_rule(wishes: list[Wish], wanted: list[float]) -> None:
    found = answers_with(wishes, LABEL, CATEGORY, CREATOR)
    assert found.tolist() == wanted and LABEL.tolist() == [1, 0, 1, 0]


def test_wishes_are_said_in_words_and_no_wording_is_both_taught_and_held_out() -> None:
    assert words_of([Wish("more", "tea"), Wish("no", "{}")], TAUGHT, 0) == "more tea, no {}"
    assert words_of([Wish("no", "tea")], HELD_OUT, 3) == "please leave out tea"
    for kind in KINDS:
        assert not set(TAUGHT[kind]) & set(HELD_OUT[kind])
        assert all(pattern.count("{}") == 1 for pattern in (*TAUGHT[kind], *HELD_OUT[kind]))


def test_wishes_tell_the_items_of_a_group_apart() -> None:
    rng = np.random.default_rng(0)
    assert not drawn(rng, ["a", "a"], ["x", "y"]) and not drawn(rng, ["", ""], ["x", "y"])
    some = [drawn(rng, CATEGORY, CREATOR) for _ in range(2_000)]
    kinds = Counter(tuple(wish.kind for wish in wishes) for wishes in some)
    assert {(kind,) for kind in KINDS} | {("more", "no"), ("more", "less")} == set(kinds)
    contrary = [wishes for wishes in some if len(wishes) == 2 and wishes[0].value == wishes[1].value]
    assert 0.02 < len(contrary) / len(some) < 0.1
    assert all(wish.value in (CATEGORY if wish.of == "category" else CREATOR) for wishes in some for wish in wishes)


def test_a_share_of_the_groups_is_instructed_and_the_others_are_left_alone(tiny_dataset: Dataset) -> None:
    plan = RankerPlan(steps=1, size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400), wishes=0.25)
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 1)
    assert trainer.variety is not None
    chosen = [("label", group) for group in range(len(trainer.pools["label"]))]
    said = trainer.variety.of(trainer.pools, chosen, 0)
    wished = [put for put in said if put.wish]
    assert 0.15 < len(wished) / len(said) < 0.3  # a group of one topic gets none
    assert all((put.label is not None) == (put.ruled is not None) == bool(put.wish) for put in said)
    worded = Counter(put.task.question for put in said)
    assert 0.35 < worded["is the label 1?"] / len(said) < 0.65 and len(worded) == 4
    again = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 1).variety
    assert again is not None
    assert [put.wish for put in again.of(trainer.pools, chosen, 0)] == [put.wish for put in said]
    assert [put.wish for put in again.of(trainer.pools, chosen, 1)] != [put.wish for put in said]
    batch = trainer.writer.write(trainer.pools, chosen[:40], said[:40])
    plain = trainer.writer.write(trainer.pools, chosen[:40])
    place = 0
    for put, asked, served in zip(said, batch.requests, plain.requests):
        part = slice(place, place := place + len(asked.items))
        assert asked.items == served.items
        if put.label is None:
            np.testing.assert_array_equal(batch.label[part], plain.label[part])
        assert (asked.prefix == served.prefix) == (not put.wish and put.task.question == "is the label 1?")


def test_the_rise_is_how_far_places_move() -> None:
    match = np.array([True, False, False, False, True])
    plain = np.array([0.0, 1, 2, 3, 0.5])
    rise, kept = _moved(plain, plain + 9 * match, match)
    assert rise == pytest.approx((0.75 + 1) / 2 - (0 + 0.25) / 2) and kept == pytest.approx(1)
    assert _moved(plain, plain, match)[0] == 0 and _moved(plain, -plain, match)[1] == pytest.approx(-1)


def test_against_the_past_means_what_was_not_liked_or_was_liked_most() -> None:
    one = List(0, np.arange(8), ["a", "a", "b", "b", "c", "c", "d", "d"], {"a": 5, "b": 1, "c": -2})
    rng, named = np.random.default_rng(0), {condition.name: condition for condition in CONDITIONS}
    found = {name: {one.about(named[name], rng) for _ in range(60)} for name in named}
    assert found["more X"] == {"a", "b", "c", "d"}
    assert found["more X, against the past"] == {"c", "d"} and found["no X, against the past"] == {"a"}
    assert not named["more X, no X"].rises and named["only X"].rises


@pytest.fixture(scope="module")
def folder(
    tiny_dataset: Dataset, tiny_tokens: Tokens, tiny_quantizer: Quantizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An untrained ranker."""
    torch.manual_seed(0)
    model = new_llama(Size(hidden=32, layers=1, heads=4, kv_heads=2, mlp=32), len(tiny_tokens), causal_lm=True)
    model.model.embed_tokens.weight.data.normal_()
    tasks, budgets = tasks_of(tiny_dataset), RankBudgets()
    facts = RankerFacts(tasks, labels_of(tiny_tokens, tasks), budgets, {}, None, {})
    path: Path = tmp_path_factory.mktemp("instructed") / "ranker"
    save_ranker(path, model, RankPrompts(tiny_tokens, tiny_quantizer, budgets), facts)
    return path


def test_an_untrained_ranker_follows_nobody_and_a_folder_without_categories_says_so(tiny_dataset: Dataset, folder: Path) -> None:
    ranker = Ranker.load(folder)
    found = {one.name: one for one in follow(tiny_dataset, ranker, members=8, listed=20, rules=False)}
    assert list(found) == [condition.name for condition in CONDITIONS]
    assert all(one.rise.low <= one.rise.value <= one.rise.high and abs(one.rise.value) < 0.4 for one in found.values())
    assert found["more X"].members == 8 and found["more X"].rise.value != 0
    assert follow(tiny_dataset, ranker, members=8, listed=20, rules=False)[0] == found["more X"]
    bare = replace(tiny_dataset, items=replace(tiny_dataset.items, category=[""] * len(tiny_dataset.items)))
    with pytest.raises(NoCategories, match="fewer than two"):
        follow(bare, ranker)


def test_as_served_even_an_untrained_ranker_obeys_what_is_said_plainly(tiny_dataset: Dataset, folder: Path) -> None:
    """Taught wordings and others: up where more is wished, down where less is, and "more X, no X" is no X.

    Items that stand on top already cannot rise.
    """
    found = follow(tiny_dataset, Ranker.load(folder), members=12, listed=24)
    for one, condition in zip(found, CONDITIONS):
        assert one.right > 0.9 and (one.rise.low > 0.05 if condition.rises else one.rise.high < -0.05), one
        assert one.order_kept > 0.95 or condition.kinds == ("only",), one  # "only" ends the order of all others


def only_topics(rng: np.random.Generator, category: Sequence[str], creator: Sequence[str]) -> tuple[Wish, ...]:
    """The easiest wish: nothing but one topic of the group."""
    named = sorted(set(category))
    return (Wish("only", named[rng.integers(len(named))]),) if len(named) > 1 and creator else ()


def test_what_is_taught_is_followed_and_measured(tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variety, "drawn", only_topics)
    size = Size(hidden=64, layers=2, heads=4, kv_heads=2, mlp=128, vocabulary=400)
    loop = LoopSettings(learning_rate=3e-3, candidates=48)
    plan = RankerPlan(steps=300, size=size, budgets=RankBudgets(item=48, prefix=160), loop=loop, wishes=1.0)
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 300)
    facts = RankerFacts(trainer.writer.tasks, trainer.labels, plan.budgets, {}, None, {})
    rises = []
    for until in (1, 300):
        trainer.run(until)
        ranker = Ranker.of(trainer.model, trainer.writer.prompts, facts, str(until))
        rises.append({one.name: one.rise for one in follow(tiny_dataset, ranker, members=20, listed=40, rules=False)}["only X"])
    assert abs(rises[0].value) < 0.1 < rises[1].low


def test_with_a_head_the_served_order_is_measured(tiny_dataset: Dataset, tmp_path: Path) -> None:
    size = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400)
    train_ranker(tiny_dataset, tmp_path / "ranker", RankerPlan(steps=2, minutes=None, size=size))
    ranker = Ranker.load(tmp_path / "ranker")
    assert ranker.head is not None
    fused = follow(tiny_dataset, ranker, members=5, listed=20)
    ranker.head = None
    alone = follow(tiny_dataset, ranker, members=5, listed=20)
    assert [one.members for one in fused] == [one.members for one in alone] and fused != alone


def test_the_command_prints_every_condition(tiny_dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    from ranking.cli.evaluate import app

    write_dataset(tiny_dataset, tmp_path / "data")
    asked = ["instructions", str(tmp_path / "data"), "--ranker", str(folder), "--members", "4", "--items", "16", "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert [one["name"] for one in json.loads(result.stdout)["conditions"]] == [condition.name for condition in CONDITIONS]


def test_who_was_never_taught_a_wish_does_not_hear_it(tiny_dataset: Dataset, folder: Path) -> None:
    """Else such words, which mean nothing to the weights, would turn the order of everything."""
    ranker = Ranker.load(folder)
    view = MemberView(tiny_dataset.members[0], (), (), "no chess")
    silent = replace(view, instruction="")
    assert ranker.prefix(view) != ranker.prefix(silent), "a folder that says nothing of its training may come from a reader"
    for told, heard in (
        ({"reads_wishes": False}, False),
        ({"reads_wishes": True}, True),
    ):
        ranker.facts = replace(ranker.facts, training=told)
        assert (ranker.prefix(view) != ranker.prefix(silent)) == heard, told
    ranker.facts = replace(ranker.facts, training={"reads_wishes": False})
    for one in follow(tiny_dataset, ranker, members=6, listed=20):
        assert one.order_kept == pytest.approx(1) or np.isnan(one.order_kept), (
            "the order of all other items is that of the silent"
        )
