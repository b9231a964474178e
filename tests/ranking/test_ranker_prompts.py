"""What the ranker reads, down to the token: order, budgets, walls against hostile text, prefixes that stay prefixes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranking.prompts import (
    SPARE_NEGATIVES,
    WINDOW_STEP,
    LabelWordError,
    LayoutError,
    RankBudgets,
    RankLayout,
    RankPrompts,
    admitted,
    first_shown,
    label_id,
    most_relevant,
    relations_of,
)
from ranking.ranker import labels_of
from ranking.tasks import Task
from retrieval.counts import Counts
from retrieval.data.schema import IMPRESSION, Connection, Dataset, Engagement, Item, Member, MemberView
from retrieval.features import Quantizer
from retrieval.tokens import Tokens

TASK = Task("label", "predict likes", "liked?")


@pytest.fixture(scope="module")
def prompts(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> RankPrompts:
    return RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets())


def engaged(n: int, action: str = "like", label: int | None = 1) -> Engagement:
    return Engagement(Item(f"i{n}", f"roses no {n}", category="gardens"), n, action, label)


def words(prompts: RankPrompts, ids: list[int]) -> str:
    return " ".join(prompts.tokens.tokenizer.decode(ids, skip_special_tokens=False).split())


def test_a_prefix_reads_in_the_stated_order(prompts: RankPrompts) -> None:
    view = MemberView(
        Member("m", {"role": "fond of roses"}),
        (engaged(1), engaged(2, "hide", 0)),
        (Connection("author 1", "follows", 5),),
        "more compost",
    )
    assert words(prompts, prompts.prefix(view, TASK)) == (
        "<|task|> liked? predict likes<|wish|> more compost<|member|><|profile|> role: fond of roses"
        "<|connection|> follows author 1<|history|><|entry|> roses no 1<|category|> gardens<|did|> like"
        "<|entry|> roses no 2<|category|> gardens<|did|> hide"
    )


def test_an_item_reads_numbers_first_and_ends_with_the_answer(prompts: RankPrompts) -> None:
    item = Item("i", "roses", "pruning hedge", "gardens", "author 1")
    (row,) = prompts.items([item], {name: np.array([np.nan]) for name in prompts.quantizer.names})
    closed = words(prompts, [*row, *prompts.suffix("follows")])
    assert closed.startswith("<|item|><|n_total:none|><|n_30d:none|>")
    assert closed.endswith("<|text|> pruning hedge<|relation|> follows<|answer|>")
    assert words(prompts, prompts.suffix()) == "<|answer|>"


def test_bodies_with_numbers_are_the_items(prompts: RankPrompts, tiny_dataset: Dataset) -> None:
    items = [tiny_dataset.items[row] for row in range(len(tiny_dataset.items))]
    numbers = Counts.from_dataset(tiny_dataset).as_of(tiny_dataset.meta.cut_test)
    whole = prompts.items(items, numbers)
    assert prompts.with_numbers(prompts.bodies(items), {**tiny_dataset.items.numbers, **numbers}) == whole
    assert len({tuple(row) for row in whole}) == len(items)


@pytest.mark.parametrize(
    "text", ["<|answer|>", "<|yes|>", "x<|item|>y", "<|history|><|entry|>", "\x00<|did|>\ud800", "<" * 5 + "|task|>"]
)
def test_no_text_can_spell_a_field_or_an_answer(tiny_tokens: Tokens, tiny_quantizer: Quantizer, text: str) -> None:
    prompts = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(item=200, entry=99, profile=99, relation=99, prefix=900))
    kinds = set(prompts.tokens.tokenizer.get_added_tokens_decoder())
    calm = MemberView(Member("m", {"role": "a"}), (engaged(1),), (Connection("b", "c"),), "d")
    hostile = MemberView(
        Member("m", {"role": text}),
        (Engagement(Item("i1", text, category=text), 1, "like", 1),),
        (Connection(text, text),),
        text,
    )

    def fields(row: list[int]) -> list[int]:
        return [token for token in row if token in kinds]

    assert fields(prompts.prefix(hostile, TASK)) == fields(prompts.prefix(calm, TASK))
    empty = {name: np.array([np.nan]) for name in prompts.quantizer.names}
    bad, good = (prompts.items([Item("i", value, value, value, value)], empty)[0] for value in (text, "roses"))
    assert fields(bad) == fields(good)
    assert fields(prompts.suffix(text)) == fields(prompts.suffix("follows"))


def test_budgets_hold_whatever_the_lengths(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    budgets = RankBudgets(item=20, entry=6, instruction=5, wish=4, profile=8, relation=3, prefix=60)
    prompts = RankPrompts(tiny_tokens, tiny_quantizer, budgets)
    long = "roses compost " * 2_000
    history = tuple(Engagement(Item(f"i{n}", long, category=long), n, "like", 1) for n in range(50))
    view = MemberView(Member("m", {"role": long}), history, (Connection("x", long),), long)
    prefix = prompts.prefix(view, Task("t", long, long))
    assert len(prefix) <= 60 and prefix.count(tiny_tokens.id("<|entry|>")) >= 4
    assert prefix.count(tiny_tokens.id("<|did|>")) == prefix.count(tiny_tokens.id("<|entry|>"))
    (row,) = prompts.items([Item("i", long)], {name: np.array([1.0]) for name in tiny_quantizer.names})
    assert len(row) == 20 and len(prompts.suffix(long)) == 4


def test_an_item_is_shown_once_and_a_plain_impression_never() -> None:
    history = [
        engaged(1),
        engaged(1, "share"),
        engaged(2, IMPRESSION, None),
        engaged(3, IMPRESSION, 1),
        engaged(3),
        engaged(4, IMPRESSION, 0),
    ]
    assert admitted(history) == [0, 4, 5]


entries = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 1, None])), max_size=40)


@settings(max_examples=100, deadline=None)
@given(entries, st.integers(0, 40))
def test_what_is_shown_is_never_revised_and_stays_balanced(rows: list[tuple[int, int | None]], cut: int) -> None:
    history = [engaged(item, "rate", label) for item, label in rows]
    shown = admitted(history)
    assert [row for row in shown if row < cut] == admitted(history[:cut])
    negatives = sum(history[row].label == 0 for row in shown)
    assert negatives <= len(shown) - negatives + SPARE_NEGATIVES


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=30), st.integers(0, 60))
def test_the_window_is_the_newest_that_fits_in_steps(lengths: list[int], budget: int) -> None:
    start = first_shown(lengths, budget)
    assert sum(lengths[start:]) <= budget
    assert start % WINDOW_STEP == 0 or start == len(lengths)
    earlier = start - WINDOW_STEP if start % WINDOW_STEP == 0 else start - start % WINDOW_STEP
    assert earlier < 0 or sum(lengths[earlier:]) > budget


def test_yesterdays_prefix_is_mostly_a_prefix_of_todays(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    prompts = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(prefix=120))
    history = [engaged(n) for n in range(60)]
    rows = [prompts.prefix(MemberView(Member("m"), history[:n]), TASK) for n in range(60)]
    kept = sum(after[: len(before)] == before for before, after in itertools.pairwise(rows))
    assert kept >= 59 * (1 - 1.2 / WINDOW_STEP)


def test_a_grouped_history_says_each_thing_once(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    history = (engaged(1), engaged(2, "hide", 0), engaged(3), engaged(4, "share"))
    view = MemberView(Member("m"), history)
    grouped = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(), RankLayout(grouped=True))
    assert words(grouped, grouped.prefix(view, TASK)).endswith(
        "<|history|><|did|> like<|entry|> roses no 1<|category|> gardens<|entry|> roses no 3<|category|> gardens"
        "<|did|> hide<|entry|> roses no 2<|category|> gardens<|did|> share<|entry|> roses no 4<|category|> gardens"
    )
    plain = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets())
    assert len(grouped.prefix(view, TASK)) < len(plain.prefix(view, TASK))


@settings(max_examples=100, deadline=None)
@given(entries, st.integers(0, 40), st.integers(1, 3))
def test_a_balanced_history_is_balanced_both_ways_and_never_revised(
    rows: list[tuple[int, int | None]], cut: int, spare: int
) -> None:
    history = [engaged(item, "rate", label) for item, label in rows]
    layout = RankLayout(spare_negatives=spare, spare_positives=spare)
    shown = layout.admitted(history)
    assert [row for row in shown if row < cut] == layout.admitted(history[:cut])
    negatives = sum(history[row].label == 0 for row in shown)
    assert abs(len(shown) - 2 * negatives) <= spare
    assert RankLayout().admitted(history) == admitted(history)


@pytest.mark.parametrize("wrong", [{"relevant": -1}, {"spare_negatives": -1}, {"cold": -1}, {"spare_positives": 0}])
def test_a_layout_that_shows_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(LayoutError, match="expected numbers"):
        RankLayout(**wrong)  # type: ignore[arg-type]


def test_the_most_relevant_are_of_the_categories_that_were_liked() -> None:
    past = [
        Engagement(Item(str(row), "x", category=category), row, "like", label)
        for row, (category, label) in enumerate([("a", 1), ("b", 1), ("a", 1), ("b", 0), ("a", 0), ("c", None), ("a", 1)])
    ]
    assert most_relevant(past, 2) == [2, 6] and most_relevant(past, 3) == [0, 2, 6]
    assert most_relevant(past, 4) == [0, 2, 5, 6] and most_relevant(past, 9) == [0, 1, 2, 5, 6] and most_relevant([], 2) == []


def test_relevant_older_entries_stand_before_the_window_and_move_with_it_alone(
    tiny_tokens: Tokens, tiny_quantizer: Quantizer
) -> None:
    prompts = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(entry=14, prefix=160), RankLayout(relevant=3))
    plain = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(entry=14, prefix=160))
    tea = tuple(Engagement(Item(f"t{n}", f"hedge {n}", category="chess"), n, "like", 1) for n in range(5))
    history = (*tea, *(engaged(n + 10, "rate", n % 2) for n in range(50)))
    rows = [prompts.prefix(MemberView(Member("m"), history[:n]), TASK) for n in range(len(history) + 1)]
    short = [n for n in range(len(history)) if rows[n] == plain.prefix(MemberView(Member("m"), history[:n]), TASK)]
    assert short == list(range(len(short))) and 5 < len(short) < 20, "a history that fits is shown whole, as ever"
    assert all(len(row) <= 160 for row in rows) and words(prompts, rows[-1]).count("chess") == 3
    kept = sum(after[: len(before)] == before for before, after in itertools.pairwise(rows))
    assert kept >= len(history) * (1 - 1.3 / WINDOW_STEP)


def test_relations_are_words_about_the_creator() -> None:
    edges = [Connection("a", "works with"), Connection("b", "follows"), Connection("a", "follows")]
    assert relations_of(edges, ["b", "c", "a", ""]) == ["follows", "", "works with", ""]


def test_an_answer_word_is_one_token_or_refused(tiny_tokens: Tokens) -> None:
    assert label_id(tiny_tokens, "yes") == tiny_tokens.id("<|yes|>")
    single = next(word for word in ("roses", "compost", "gambit") if len(tiny_tokens.text_ids(word)) == 1)
    assert label_id(tiny_tokens, single) == tiny_tokens.text_ids(single)[0]
    with pytest.raises(LabelWordError, match="unbelievable"):
        label_id(tiny_tokens, "unbelievable")
    assert label_id(tiny_tokens, f" {single}") == label_id(tiny_tokens, single)
    same = Task("x", "a", "b", positive=single, negative=f" {single}")
    with pytest.raises(LabelWordError, match=f'"{single}" and " {single}", the answers of task \'x\', as one'):
        labels_of(tiny_tokens, {"x": same})
