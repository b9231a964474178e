"""Answered examples: from the past of others, the same for all who need them, and the first to give way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ranking.learn.batches import GroupWriter
from ranking.learn.examples import answers
from ranking.prompts import RankBudgets, RankLayout, RankPrompts
from ranking.shots import MOST, Shot, ShotsError, check_shots, shots_facts, shots_of
from ranking.shots_past import PastShots
from ranking.tasks import Task, tasks_of
from retrieval.data.schema import DAY, Dataset, Engagement, Item, Member, MemberView
from retrieval.features import Quantizer
from retrieval.tokens import Tokens

TASK = Task("label", "predict likes", "liked?")
SHOTS = tuple(Shot(f"roses no {number}", "gardens", number % 2 == 0) for number in range(4))


def words(prompts: RankPrompts, ids: list[int]) -> str:
    return " ".join(prompts.tokens.tokenizer.decode(ids, skip_special_tokens=False).split())


def view_of_length(entries: int) -> MemberView:
    done = [Engagement(Item(f"i{number}", f"filter no {number}"), number, "like", 1) for number in range(entries)]
    return MemberView(Member("m", {"role": "barista"}), done, (), "more coffee")


@pytest.fixture(scope="module")
def prompts(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> RankPrompts:
    return RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(), RankLayout(cold=3), {"label": SHOTS})


def test_examples_stand_before_all_that_is_the_members_own(prompts: RankPrompts) -> None:
    told = words(prompts, prompts.prefix(view_of_length(1), TASK))
    assert told.startswith(
        "<|task|> liked? predict likes<|entry|> roses no 0<|category|> gardens<|answer|><|yes|>"
        "<|entry|> roses no 1<|category|> gardens<|answer|><|no|>"
    )
    assert told.endswith("<|wish|> more coffee<|member|><|profile|> role: barista<|history|><|entry|> filter no 0<|did|> like")


def test_members_who_need_examples_share_the_beginning_and_others_have_none(
    prompts: RankPrompts, tiny_tokens: Tokens, tiny_quantizer: Quantizer
) -> None:
    first, second = (prompts.prefix(view_of_length(entries), TASK) for entries in (0, 2))
    shared = sum(len(row) for row in prompts.examples(TASK)) + len(prompts.opening(view_of_length(0), TASK)[0])
    assert first[:shared] == second[:shared]
    plain = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets())
    assert prompts.prefix(view_of_length(3), TASK) == plain.prefix(view_of_length(3), TASK)
    assert prompts.prefix(view_of_length(0), replace(TASK, name="other")) == plain.prefix(view_of_length(0), TASK)


def test_examples_give_way_to_all_else_the_last_ones_first(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    found = {}
    for budget in range(40, 160, 8):
        layout, budgets = RankLayout(cold=9), RankBudgets(prefix=budget)
        plain = RankPrompts(tiny_tokens, tiny_quantizer, budgets, layout)
        prompts = RankPrompts(tiny_tokens, tiny_quantizer, budgets, layout, {"label": SHOTS})
        view = view_of_length(2)
        row, without = prompts.prefix(view, TASK), plain.prefix(view, TASK)
        asked = len(plain.opening(view, TASK)[0])
        examples = row[asked : asked + len(row) - len(without)]
        assert len(row) <= max(budget, len(without)) and row[:asked] + row[asked + len(examples) :] == without
        rows = prompts.examples(TASK)
        told = [[token for example in rows[:count] for token in example] for count in range(5)]
        if without.count(tiny_tokens.id("<|entry|>")) == 2:
            found[budget] = told.index(examples)
    assert set(found.values()) == {0, 1, 2, 3, 4} and list(found.values()) == sorted(found.values())


def test_no_text_of_an_example_can_spell_an_answer(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    stranger = MemberView(Member("m"))

    def fields(text: str) -> list[int]:
        shots = {"label": (Shot(text, text, True),)}
        row = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(entry=99), RankLayout(), shots).prefix(stranger, TASK)
        return [token for token in row if token in tiny_tokens.tokenizer.get_added_tokens_decoder()]

    assert fields("<|answer|><|no|>") == fields("roses")


def test_examples_are_of_others_and_of_days_before(tiny_dataset: Dataset) -> None:
    tasks, moment = tasks_of(tiny_dataset), tiny_dataset.meta.cut_valid + 5_000
    past, log = PastShots(tiny_dataset, tasks, 6, 1 << 60), tiny_dataset.events
    early = replace(tiny_dataset, events=log.before(moment - moment % DAY))
    for name, task in tasks.items():
        shots = past.before(name, moment)
        assert [shot.positive for shot in shots] == [True, False] * 3
        assert shots == PastShots(early, tasks, 6, 1 << 60).before(name, moment) == past.before(name, moment - moment % DAY)
        event, label = answers(early, task)
        known = {(tiny_dataset.items.title[item], bool(said)) for item, said in zip(log.item[event].tolist(), label.tolist())}
        assert {(shot.title, shot.positive) for shot in shots} <= known
        newest = int(log.member[event[label == 1][-1]])
        assert past.before(name, moment, newest)[0] != shots[0] and len(past.before(name, moment, newest)) == 6


def late_likes(dataset: Dataset) -> Dataset:
    """The same with every like three days later."""
    log = dataset.events
    timestamp = log.timestamp + 3 * DAY * (log.action == log.actions.index("like"))
    return replace(dataset, events=replace(log, timestamp=timestamp).take(np.argsort(timestamp, kind="stable")))


def as_known(dataset: Dataset, moment: int) -> Dataset:
    """What a folder that was written at a moment would say: no later event, and no label that a later like gave."""
    log = dataset.events
    keys = list(zip(log.request.tolist(), log.member.tolist(), log.item.tolist()))
    likes = np.flatnonzero((log.action == log.actions.index("like")) & (log.timestamp >= moment)).tolist()
    later = {keys[row] for row in likes}
    label = [0 if key in later else said for key, said in zip(keys, log.label.tolist())]
    return replace(dataset, events=replace(log, label=np.array(label, np.int8)).before(moment))


@pytest.mark.parametrize("name", ["like", "label", "passed over"])
def test_an_answer_that_came_later_is_not_known(tiny_dataset: Dataset, name: str) -> None:
    dataset, moment = late_likes(tiny_dataset), tiny_dataset.meta.cut_valid
    tasks = {**tasks_of(tiny_dataset), "passed over": Task("passed over", "a", "b", label=0)}
    past = PastShots(dataset, tasks, 8, 1 << 60)
    shots = past.before(name, moment)
    assert len(shots) == 8 and shots == PastShots(as_known(dataset, moment), tasks, 8, 1 << 60).before(name, moment)
    assert past.before(name, moment + 3 * DAY) != shots == PastShots(dataset, tasks, 8, moment).before(name, moment + 9 * DAY)


def test_nothing_after_the_end_is_known(tiny_dataset: Dataset) -> None:
    tasks, cut = tasks_of(tiny_dataset), tiny_dataset.meta.cut_valid
    ended = PastShots(tiny_dataset, tasks, 4, cut)
    assert ended.before("like", tiny_dataset.meta.cut_test) == ended.before("like", cut)
    assert ended.before("like", 0) == () and ended.before("unknown", cut) == ()
    assert PastShots(tiny_dataset, tasks, 0, cut).of_all(tasks, cut) == {}


def test_a_writer_shows_what_the_folder_holds(tiny_dataset: Dataset, tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    tasks, cut = tasks_of(tiny_dataset), tiny_dataset.meta.cut_test
    shots = PastShots(tiny_dataset, tasks, 4, cut).of_all(tasks, cut)
    prompts = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(), RankLayout(), shots_of(shots_facts(shots)))
    writer = GroupWriter(tiny_dataset, prompts, tasks, cut)
    first = int(tiny_dataset.events.timestamp.min())
    served = prompts.prefix(MemberView(tiny_dataset.members[0], (), tiny_dataset.connections_of(0, first)), tasks["like"])
    assert writer.prefix(0, first, tasks["like"]) == served
    assert np.count_nonzero(np.array(served) == tiny_tokens.id("<|answer|>")) == 4


def test_facts_that_are_no_examples_are_refused() -> None:
    for facts in ({"a": [{"title": "x"}]}, {"a": [{"title": 1, "category": "", "positive": True}]}, {"a": 3}, [1]):
        with pytest.raises(ShotsError):
            shots_of(facts)  # type: ignore[arg-type]
    with pytest.raises(ShotsError, match="expected 0 to 16"):
        check_shots(MOST + 1)
