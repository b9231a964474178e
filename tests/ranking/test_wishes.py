"""Plain wishes: how they are read, what they do to scores, and what they leave alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranking.learn.wishes import HELD_OUT, KINDS, TAUGHT
from ranking.wishes import MOST_WISHES, Columns, obey, wishes_of, words_in

CATEGORY = ["Databases", "Politics, News", "Science Fiction", "Jazz & Blues|Music", ""]
CREATOR = ["Ann Smith", "", "Ann Smith", "Bo", "Politics Weekly"]
TITLE = ["Ten indexes", "A vote", "Stars", "Blue notes", "Database news"]
SCORES = np.array([0.2, 0.9, 0.5, 0.4, 0.6], np.float32)
TOPICS = {words_in(topic) for topic in ("Databases", "Politics", "Science Fiction", "Jazz & Blues", "Music", "Ann Smith", "Bo")}


def columns(name: str) -> list[str]:
    return {"category": CATEGORY, "creator": CREATOR, "title": TITLE}[name]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("more about databases, no politics", [("more", "database"), ("no", "politic")]),
        ("I want no politics.", [("no", "politic")]),
        ("please don't show me any more politics", [("no", "politic")]),
        ("I\u2019m tired of politics and music", [("no", "politic"), ("no", "music")]),
        ("politics, music: I am sick of them", []),
        ("nothing but science fiction", [("only", "science fiction")]),
        ("Music only", [("only", "music")]),
        ("music and nothing else", [("only", "music")]),
        ("get rid of everything but music", [("only", "music")]),
        ("anything but music", [("no", "music")]),
        ("a bit too much music lately; fewer politics", [("less", "music"), ("less", "politic")]),
        ("could you show me more from Ann Smith, please", [("more", "ann smith")]),
        ("I like jazz & blues but not music", [("more", "jazz blue"), ("no", "music")]),
        ("more music or databases", [("more", "music"), ("more", "database")]),
        ("I don't mind politics", []),
        ("what is science fiction?", []),
        ("politics bores me", []),
        ("surprise me", []),
        ("no", []),
        ("", []),
    ],
)
def test_plain_english_is_read(said: str, wanted: list[tuple[str, str]]) -> None:
    assert [(wish.kind, " ".join(wish.topic)) for wish in wishes_of(said, TOPICS)] == wanted


def test_words_that_are_no_topic_are_read_in_plain_forms_alone() -> None:
    (wish,) = wishes_of("show me more about crypto wallets please", TOPICS)
    assert (wish.kind, wish.words, wish.topic) == ("more", {"crypto", "wallet"}, ())
    assert wish.fits((), [frozenset({"my", "crypto", "wallet"})]) and not wish.fits((), [frozenset({"crypto"})])
    assert wishes_of("I could do with some crypto wallets", TOPICS) == []


def test_every_wording_of_the_measurement_is_read_as_what_it_means() -> None:
    for wordings in (TAUGHT, HELD_OUT):
        for kind in KINDS:
            for pattern in wordings[kind]:
                assert [wish.kind for wish in wishes_of(pattern.format("Science Fiction"), TOPICS)] == [kind], pattern


@pytest.mark.parametrize(
    ("file", "understood", "wrong_way", "imagined"),
    [("wishes_tuned_on.jsonl", 0.8, 0.01, 0.01), ("wishes_unseen.jsonl", 0.7, 0.06, 0.05)],
)
def test_what_people_type_is_mostly_understood_and_seldom_the_wrong_way(
    file: str, understood: float, wrong_way: float, imagined: float
) -> None:
    """Phrases written by somebody who knew nothing of the rules; those of the second file were not looked at since. A rule
    changed after reading them makes them the first kind: have new ones written."""
    found = Counter[str]()
    for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
        phrase = json.loads(line)
        wishes = wishes_of(phrase["text"].replace("{X}", "Science Fiction"), TOPICS)
        kinds = [wish.kind for wish in wishes if wish.topic == ("science", "fiction")]
        last, meant = max(kinds, key=KINDS.index) if kinds else "none", phrase["kind"]
        found["remarks" if meant == "none" else "wishes"] += 1
        found["imagined"] += meant == "none" and last != "none"
        found["understood"] += meant != "none" and last == meant
        found["wrong way"] += "none" not in (meant, last) and (last in ("more", "only")) != (meant in ("more", "only"))
    assert found["understood"] > understood * found["wishes"] > 80 * understood, found
    assert found["wrong way"] <= wrong_way * found["wishes"] and found["imagined"] <= imagined * found["remarks"], found


@pytest.mark.parametrize(
    ("said", "bottom", "wanted"),
    [
        ("more databases", 0.0, [0.6, 0.9, 0.5, 0.4, 0.6]),
        ("less politics", 0.0, [0.2, 0.45, 0.5, 0.4, 0.6]),
        ("less politics", -1.0, [0.2, -0.05, 0.5, 0.4, 0.6]),
        ("no politics", 0.0, [0.2, 0.0, 0.5, 0.4, 0.6]),
        ("no politics", -1.0, [0.2, -1.0, 0.5, 0.4, 0.6]),
        ("only Ann Smith", 0.0, [0.6, 0.0, 0.75, 0.0, 0.0]),
        ("more news", 0.0, [0.2, 0.95, 0.5, 0.4, 0.6]),
        ("more votes", 0.0, [0.2, 0.95, 0.5, 0.4, 0.6]),
        ("no politics, more politics", 0.0, [0.2, 0.0, 0.5, 0.4, 0.6]),
        ("more databases, less databases", 0.0, [0.3, 0.9, 0.5, 0.4, 0.6]),
        ("only gardening", 0.0, [0.2, 0.9, 0.5, 0.4, 0.6]),
        ("no fictions of science", 0.0, [0.2, 0.9, 0.5, 0.4, 0.6]),
        ("no fiction", 0.0, [0.2, 0.9, 0.0, 0.4, 0.6]),
    ],
)
def test_scores_move_as_stated(said: str, bottom: float, wanted: list[float]) -> None:
    moved, done = obey(said, SCORES, columns, bottom)
    np.testing.assert_allclose(moved, wanted, atol=1e-6)
    assert SCORES.tolist() == pytest.approx([0.2, 0.9, 0.5, 0.4, 0.6]), "the scores given are left as they were"
    assert bool(done) == (moved.tolist() != SCORES.tolist())


def test_what_was_obeyed_is_told_in_the_order_in_which_it_applied() -> None:
    _, done = obey("No politics, more databases, only gardening", SCORES, columns)
    assert [(one.wish.kind, one.wish.said, one.items) for one in done] == [
        ("more", "more databases", 1),
        ("no", "no politics", 1),
    ]


def test_without_a_wish_scores_are_those_given_and_nothing_is_read_without_an_instruction() -> None:
    def unread(name: str) -> list[str]:
        raise AssertionError(name)

    reading: Columns = unread
    assert obey("  ", SCORES, reading)[0] is SCORES and obey("no politics", np.zeros(0, np.float32), reading)[1] == []
    assert obey("surprise me", SCORES, columns) == (SCORES, [])


@given(st.text(max_size=300), st.sampled_from([0.0, -1.0]))
def test_any_text_leaves_scores_between_bottom_and_one(said: str, bottom: float) -> None:
    moved, done = obey(said, SCORES, columns, bottom)
    assert moved.shape == SCORES.shape and (moved >= bottom).all() and (moved <= 1).all() and len(done) <= MOST_WISHES


def test_hostile_texts_cost_no_time() -> None:
    hostile = (
        "i " * 1_000,
        "please " * 290 + "x",
        "no " * 680,
        "could you show me " * 110,
        "too much " * 220,
        "not so " * 290,
        ", no x" * 340,
    )
    began = time.process_time()
    for said in hostile:
        obey(said, SCORES, lambda name: [name * 100_000] * len(SCORES))
    assert time.process_time() - began < 5, "milliseconds as it is; minutes where a pattern tries every way"


def test_a_creator_named_like_the_words_of_a_wish_is_no_topic() -> None:
    names = {"category": ["Jazz", "Rock"], "creator": ["Me", "No More"], "title": ["", ""]}
    moved, done = obey("show me more jazz, no more rock", np.array([0.5, 0.5], np.float32), names.__getitem__)
    assert moved.tolist() == [0.75, 0.0] and [one.wish.said for one in done] == ["show me more jazz", "no more rock"]
