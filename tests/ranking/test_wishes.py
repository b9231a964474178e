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

from ranking.learn.wishes import HELD_OUT, TAUGHT
from ranking.wishes import CUES, FACTOR, KINDS, MOST_WISHES, Topics, obey, topics_of, wishes_of

NAMES = [
    ("Databases", "Ann Smith"),
    ("Politics, News", ""),
    ("Science Fiction", "Ann Smith"),
    ("Jazz & Blues|Music", "Bo"),
    ("Jazz", "The Beatles"),
    ("Movies", ""),
    ("C++", ""),
]
TOPICS = [topics_of(category, creator) for category, creator in NAMES]
KNOWN: Topics = frozenset().union(*TOPICS)
SCORES = np.array([0.2, 0.9, 0.5, 0.4, 0.6, 0.3, 0.1], np.float32)


def read(said: str) -> list[tuple[str, str]]:
    return [(wish.kind, " ".join(wish.topic)) for wish in wishes_of(said, KNOWN)]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("more about databases, no politics", [("more", "database"), ("no", "politic")]),
        ("I want no politics.", [("no", "politic")]),
        ("please don't show me any more politics", [("no", "politic")]),
        ("I\u2019m tired of politics and music", [("no", "politic"), ("no", "music")]),
        ("don\u00b4t show politics", [("no", "politic")]),
        ("I didnt like jazz", [("no", "jazz")]),
        ("nothing but science fiction", [("only", "science fiction")]),
        ("music and nothing else", [("only", "music")]),
        ("only jazz and music", [("only", "jazz"), ("only", "music")]),
        ("get rid of everything but music", [("only", "music")]),
        ("anything but music", [("no", "music")]),
        ("a bit too much music lately; fewer politics", [("less", "music"), ("less", "politic")]),
        ("could you show me more from Ann Smith, please", [("more", "ann smith")]),
        ("I like jazz & blues but not music", [("more", "jazz blue"), ("no", "music")]),
        ("more music or databases", [("more", "music"), ("more", "database")]),
        ("more jazz less politics", [("more", "jazz"), ("less", "politic")]),
        ("more jazz (no politics)", [("more", "jazz"), ("no", "politic")]),
        ("more jazz/no politics", [("more", "jazz"), ("no", "politic")]),
        ("not politics but jazz", [("no", "politic")]),
        ("show me jazz instead of politics", [("more", "jazz")]),
        ("no jazz, blues are fine", [("no", "jazz")]),
        ("no movie", [("no", "movy")]),
        ("no c++, more of the Beatles", [("no", "c++"), ("more", "beatle")]),
        ("more music, more music", [("more", "music")]),
    ],
)
def test_plain_english_is_read(said: str, wanted: list[tuple[str, str]]) -> None:
    assert read(said) == wanted


@pytest.mark.parametrize(
    "said",
    [
        "", "no", "surprise me", "politics bores me", "what is science fiction?", "how many movies do you have",
        "I don't mind politics",
        "not only jazz", "not just politics", "more than just politics", "please don't just show me jazz", "tired of just jazz",
        "don't limit me to jazz", "I just want politics gone", "don't hide jazz", "don't stop showing me jazz",
        "never enough jazz",
        "I can't live without jazz", "I don't want to miss any jazz", "I never see jazz anymore", "I'm not tired of jazz",
        "no need to hide politics", "no doubt jazz is great", "no problem with jazz", "please remove the block on jazz",
        "I used to love politics", "I need a break from politics", "show me something other than politics", "no less jazz",
        "I prefer jazz to politics", "no politics from Ann Smith", "only science fiction by Bo",
        "no politics unless it's jazz",
        "I'd like more music with less politics", "just curious", "only the best", "no problem", "more like this", "less of that",
    ],
)  # fmt: skip
def test_what_is_not_surely_understood_is_nothing(said: str) -> None:
    """Each of these was, by an earlier version of the rules or by their neighbour, obeyed against its words."""
    assert read(said) == []


def test_every_wording_of_the_measurement_is_read_as_what_it_means() -> None:
    for wordings in (TAUGHT, HELD_OUT):
        for kind in KINDS:
            for pattern in wordings[kind]:
                assert read(pattern.format("Science Fiction")) == [(kind, "science fiction")], pattern


@pytest.mark.parametrize(
    ("file", "understood", "wrong_way", "imagined"),
    [("wishes_tuned_on.jsonl", 0.8, 0.01, 0.01), ("wishes_unseen.jsonl", 0.7, 0.05, 0.05)],
)
def test_what_people_type_is_mostly_understood_and_seldom_the_wrong_way(
    file: str, understood: float, wrong_way: float, imagined: float
) -> None:
    """Phrases about one topic each, by somebody who knew nothing of the rules; those of the second file were not looked at since.
    A rule changed after reading them makes them the first kind: have new ones written."""
    found = Counter[str]()
    for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
        phrase = json.loads(line)
        kinds = [wish.kind for wish in wishes_of(phrase["text"].replace("{X}", "Science Fiction"), KNOWN)]
        last, meant = max(kinds, key=KINDS.index) if kinds else "none", phrase["kind"]
        found["remarks" if meant == "none" else "wishes"] += 1
        found["imagined"] += meant == "none" and last != "none"
        found["understood"] += meant != "none" and last == meant
        found["wrong way"] += "none" not in (meant, last) and (last in ("more", "only")) != (meant in ("more", "only"))
    assert found["understood"] > understood * found["wishes"] > 80 * understood, found
    assert found["wrong way"] <= wrong_way * found["wishes"] and found["imagined"] <= imagined * found["remarks"], found


def odds(score: float, factor: float = FACTOR) -> float:
    return factor * score / (1 - score + factor * score)


@pytest.mark.parametrize(
    ("said", "bottom", "wanted"),
    [
        ("more databases", 0.0, {0: odds(0.2)}),
        ("less politics", 0.0, {1: odds(0.9, 1 / FACTOR)}),
        ("less politics", -1.0, {1: 2 * odds(0.95, 1 / FACTOR) - 1}),
        ("no politics", 0.0, {1: 0.0}),
        ("no politics", -1.0, {1: -1.0}),
        ("only Ann Smith", 0.0, dict.fromkeys((1, 3, 4, 5, 6), 0.0)),
        ("only databases, jazz", 0.0, dict.fromkeys((1, 2, 3, 5, 6), 0.0)),
        ("only jazz, databases", 0.0, dict.fromkeys((1, 2, 3, 5, 6), 0.0)),
        ("no politics, more politics", 0.0, {1: 0.0}),
        ("only Ann Smith, no databases", 0.0, dict.fromkeys((0, 1, 3, 4, 5, 6), 0.0)),
        ("more databases, less databases", 0.0, {}),
        ("only gardening", 0.0, {}),
        ("more news", 0.0, {1: odds(0.9)}),
    ],
)
def test_scores_move_as_stated(said: str, bottom: float, wanted: dict[int, float]) -> None:
    moved, done = obey(said, SCORES, TOPICS, bottom)
    expected = SCORES.copy()
    expected[list(wanted)] = list(wanted.values())
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert SCORES.tolist() == pytest.approx([0.2, 0.9, 0.5, 0.4, 0.6, 0.3, 0.1]), "the scores given are left as they were"
    assert bool(done) == bool(read(said))


def test_more_is_not_only_and_keeps_the_order_among_its_items() -> None:
    rare = np.array([0.001, 0.03, 0.02, 0.002, 0.5], np.float32)
    topics = [topics_of(name, "") for name in ("Jazz", "Rock", "Rock", "Jazz", "Jazz")]
    moved, _ = obey("more jazz", rare, topics)
    assert moved[0] < moved[3] < moved[2] < moved[1] < moved[4], "a rare thing is likelier now, and not the first of all"


def test_what_was_obeyed_is_told_as_it_was_said() -> None:
    _, done = obey("No Politics, more Databases, only gardening", SCORES, TOPICS)
    told = [(one.wish.kind, one.wish.said, one.items) for one in done]
    assert told == [("no", "no politics", 1), ("more", "more databases", 1)]


def test_without_a_wish_scores_are_those_given() -> None:
    assert obey("surprise me", SCORES, TOPICS) == (SCORES, []) and obey("", SCORES, TOPICS)[0] is SCORES


def test_a_topic_that_only_others_have_is_understood() -> None:
    """An item that was no candidate is judged by what the member said about those that were."""
    topics, one = [topics_of("Jazz", "")], np.array([0.8], np.float32)
    assert obey("only politics", one, topics)[0] is one
    assert obey("only politics", one, topics, known=topics_of("Politics", ""))[0].tolist() == [0.0]


@pytest.mark.parametrize("name", ["Me", "No Politics", "Just Jazz", "More", "The", "", "Live"])
def test_a_name_made_of_the_words_of_wishes_is_no_topic(name: str) -> None:
    assert topics_of("", name) == frozenset() and topics_of(name, "") == frozenset()


@given(
    st.lists(
        st.sampled_from(
            ["no", "not", "only", "just", "more", "less", "don't", "hide", "jazz", ",", "but", ".", "everything except"]
        )
    )
)
def test_any_words_leave_scores_between_bottom_and_one(words: list[str]) -> None:
    for bottom in (0.0, -1.0):
        moved, done = obey(" ".join(words), SCORES, TOPICS, bottom)
        assert moved.shape == SCORES.shape and (moved >= bottom).all() and (moved <= 1).all() and len(done) <= MOST_WISHES


def test_hostile_texts_cost_no_time() -> None:
    """Two kilobytes each, with a topic in them, so that every cue is searched."""
    parts = (
        "i ",
        "please ",
        "no ",
        "could you show me ",
        "too much ",
        "not so ",
        ", no x",
        "x ",
        "no x all ",
        "everything but ",
        "get a a ",
    )
    began = time.process_time()
    for part in parts:
        for said in (
            part * (2_000 // len(part)) + " x",
            "x " + part * (2_000 // len(part)),
            "don't " + part * 200 + "x all isn't",
        ):
            obey(said, SCORES, [topics_of("x", "")] * len(SCORES))
    assert time.process_time() - began < 5, "a second as it is; minutes where a pattern tries every way"


def test_every_cue_is_reached() -> None:
    """A cue that nothing which people type ever meets would be dead."""
    met = Counter[str]()
    for file in ("wishes_tuned_on.jsonl", "wishes_unseen.jsonl"):
        for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
            clause = json.loads(line)["text"].casefold().replace("{x}", "X")
            met.update(cue.pattern for _, cue in CUES if cue.search(clause))
    assert {cue.pattern for _, cue in CUES} - set(met) == set()
