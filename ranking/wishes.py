"""What a member says they want, read by rule and obeyed after the models.

A ranker of a few million weights, made from one log, does not follow words: what it was taught of wishes moved nothing
(docs/tasks.md has the figures). A member who says "no politics" must not depend on that. So plain English is read here and moves
the final score of the items that it is about; the words stand in the prompt all the same, for checkpoints that can read.

    more X    half of the way to 1            less X    half of the way to the bottom
    only X    the same, and everything else to the bottom       no X      to the bottom

X is a category or a creator of one of the candidates, wherever it stands in a clause; what the clause wants of it is told by its
other words (CUES, the first that is found counts). Or a clause begins with a plain form ("more X"), and X are words that stand
together in an item's category, creator or title. Where wishes meet, the stricter one counts: they apply in the order more, only,
less, no. What is not understood, and what no candidate fits, changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrieval.pooled_rate import categories_of

Kind = Literal["more", "only", "less", "no"]
KINDS: tuple[Kind, ...] = ("more", "only", "less", "no")
"""In the order in which they apply."""
MOST_WISHES, READ_CHARS, LONGEST_TOPIC = 16, 256, 8
"""Clauses of one instruction that are read, characters of a category, creator or title, words of a category or creator."""

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Columns = Callable[[str], Sequence[str]]
""""category", "creator" or "title" -> that text of each of C candidates."""
Words = tuple[str, ...]

_NEAR = r"(?:[\w'%&-]+ ){0,4}"
_REST = rf"(?:everything|anything|all)(?: else)? (?:but|except|besides|beside|outside|apart from|other than) {_NEAR}X"
_AWAY = r"no|not|never|do not|don't|dont|without|hide|remove|delete|rid of|exclude|block|skip|drop|stop|quit|avoid|mute|ban|ditch"
_VERBS = r"want|show|give|need|see|get|recommend|interested|like|me|to|in|things|stuff|items|about|that are|from|please"
_CUES: tuple[tuple[Kind | None, str], ...] = (
    (None, r"^(?:what|how (?!about)|who|when|where (?!are all)|why|which|did|does|do you|has|have you)\b"),
    (
        None,
        r"^(?:is|are) (?!there (?:a|any) way)|\b(?:don't|dont|do not) mind\b|\b(?:tagged|spelled|labelled|pictures?|page|link)\b",
    ),
    (
        "more",
        r"\bcan(?:no|')?t get enough\b|\bnot enough X|\byou (?:never|hardly|rarely|don't)(?: ever)? (?:show|give|recommend)\b",
    ),
    ("less", r"\b(?:less|fewer|smaller|too (?:much|many|often)|(?:so|this|that|as|quite) (?:much|many|often|hard))\b"),
    ("less", r"\b(?:reduce|lower|decrease|in moderation|sparingly|go easy|overdo\w*|minim(?:um|i[sz]e|al)|calm down)\b"),
    (
        "less",
        r"\b(?:cut|dial|tone|scale|ease|slow)\b.* (?:down|back|off|up on)\b|\bturn\b.* down\b|\benough\b.* for (?:a while|now)\b",
    ),
    ("less", r"\b(?:once in a while|now and then|occasional(?:ly)?|rarely|seldom)\b"),
    ("less", r"\b(?:a (?:little|bit)|kind of|kinda|somewhat|getting) (?:tired|sick|bored)\b"),
    ("less", r"\bnot (?:a |that |so |such a |very |really )+(?:huge|big|great|into|keen|interested|fond)\b"),
    ("only", rf"\b(?:{_AWAY}|nothing)\b.*\b{_REST}|\b(?:everything|anything|all)\b.* (?:isn't|is not|aren't|not) X"),
    ("only", r"\bif it(?:'s| is) not X|\bnothing else\b|\bnothing (?:but|except) X|\b100% X|^all X|\beverything\b.* be X"),
    ("no", rf"\b{_REST}"),
    ("only", rf"\b(?:only|solely|purely|exclusively|strictly|just)(?: (?:{_VERBS}))* X|\bX (?:only|exclusively)\b|\band only\b"),
    ("only", r"\b(?:limit|restrict|stick|narrow)\b.*\bto X"),
    ("no", rf"\b(?:{_AWAY}|none of|zero|nope to|hate|loathe|dislike|unfollow|opt out of|fed up with|spare me) {_NEAR}X"),
    ("no", rf"\b(?:can't|cant|cannot) stand {_NEAR}X|\b(?:sick|tired|bored|done|enough)(?: of| with) {_NEAR}X"),
    ("no", r"\b(?:get|take|leave|keep|filter|turn|switch) (?:out |off )?(?:[\w'-]+ ){0,2}X(?: [\w'-]+){0,2} (?:off|out|away)\b"),
    ("no", r"\b(?:leave|filter|turn|switch|keep) (?:out|off|away) (?:[\w'-]+ ){0,2}X|\bX (?:is|are) not (?:for me|my thing)\b"),
    (None, r"n't\b|\b(?:no|not|never|without|stop)\b"),
    (
        "more",
        rf"\b(?:more|love|like|enjoy|into|want|need|show|give|recommend|see(?:ing)?|add|increase|boost|prefer|feed me) {_NEAR}X",
    ),
    ("more", rf"\b(?:plenty of|lots of|extra|big fan of|fan of|mood for|looking for|interested in|crav(?:e|ing)|focus) {_NEAR}X"),
    ("more", rf"\b(?:mainly|mostly|especially|turn up|surprise me with|how about|keen on|fond of|some|please) {_NEAR}X"),
    ("more", r"\bX (?:please|pls|plz|suggestions|is great|are great)\b|\bmore like that\b"),
)
CUES = tuple((kind, re.compile(cue)) for kind, cue in _CUES)
"""What the words beside X want of it, X being in their place; None: nothing."""
_FORMS: tuple[tuple[Kind, str], ...] = (
    ("less", r"less|fewer|(?:not (?:so|too) |too )(?:much|many)"),
    ("no", r"(?:no more|no|never show|hide|skip|avoid|without|(?:i )?(?:don't|do not) (?:want|show)(?: me)?)(?: any)?"),
    ("only", r"only|just|exclusively|nothing but"),
    ("more", r"more|plenty of|lots of"),
)
_ASKED = r"(?:please |i want |show me |give me |i would like to see )*"
FORMS = tuple((kind, re.compile(rf"{_ASKED}(?:{form}) (?P<about>.+)")) for kind, form in _FORMS)
_LEADS = re.compile(r"^(?:(?:of|about|on|from|by|with|in|like|the|a|an|any|some|this|items?|things?|stuff|posts?)[: ]+)+")
_TAILS = re.compile(
    r"(?: (?:please|thanks|lately|recently|today|now|for me|at all|any ?more|again|items?|things?|stuff|posts?))+$"
)
_BREAKS = re.compile(r"[,;.!?\n]+|(?<!thing)(?<! all) but | and (?!nothing else)| or | so (?!much|many|often)| then ")
_WORD = re.compile(r"\w+")
_SMALL = frozenset(
    _WORD.findall(
        "i me my we you your it its that this these those the a an of on in to for from with about and or but so any some all "
        "every everything anything nothing more less fewer only just no not never much many too please show want see like love "
        "give need get hide stop skip don t do m ve d is are be can could would thing stuff item else again"
    )
)
"""Words, folded, that wishes are made of."""
_TOPIC = re.compile("\x00(\\d+)\x00")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a member wants of the items of a `topic` (words of a whole category or creator), or, without one, of those whose
    category, creator or title hold all `words`; `said` is the clause that says it."""

    kind: Kind
    words: frozenset[str]
    topic: Words
    said: str

    def fits(self, topics: Collection[Words], texts: Collection[frozenset[str]]) -> bool:
        """Whether an item with these categories and creator, and words of these texts, is what the wish is about."""
        return self.topic in topics if self.topic else any(self.words <= words for words in texts)


@dataclass(frozen=True, slots=True)
class Obeyed:
    """A wish, and how many candidates it is about."""

    wish: Wish
    items: int


def wishes_of(instruction: str, topics: Collection[Words]) -> list[Wish]:
    """The wishes of an instruction about items of these `topics`, in the order in which they were said."""
    text = unicodedata.normalize("NFKC", instruction).casefold().replace("\u2019", "'").replace("\x00", " ")
    found: list[Wish] = []
    last: Kind | None = None
    for part in _BREAKS.split(_marked(text, topics))[:MOST_WISHES]:
        clause = " ".join(part.split())
        named = [text[int(at[1]) :] for at in _TOPIC.finditer(clause)]
        said = _TOPIC.sub(lambda at: _head(text[int(at[1]) :], topics), clause)
        if not named:
            found += _plain(said)
            continue
        kind = _wanted(_TOPIC.sub("X", clause)) or (last if _TOPIC.fullmatch(clause) else None)
        if kind is not None:
            heads = [words_in(_head(rest, topics)) for rest in named]
            found += [Wish(kind, frozenset(head), head, said) for head in dict.fromkeys(heads)]
            last = kind
    return found


def _marked(text: str, topics: Collection[Words]) -> str:
    """The text with each topic, the longest first, as the place where it begins between two zero bytes."""
    words = list(_WORD.finditer(text))
    stems, parts, end, place = [_stem(word[0]) for word in words], list[str](), 0, 0
    while place < len(words):
        length = _length(stems[place : place + LONGEST_TOPIC], topics)
        if length:
            parts += [text[end : words[place].start()], f"\x00{words[place].start()}\x00"]
            end = words[place + length - 1].end()
        place += max(1, length)
    return "".join([*parts, text[end:]])


def _length(stems: Sequence[str], topics: Collection[Words]) -> int:
    """How many of the words make a topic; 0 if none does."""
    return next((size for size in range(len(stems), 0, -1) if tuple(stems[:size]) in topics), 0)


def _head(text: str, topics: Collection[Words]) -> str:
    """The topic that a text begins with, as it is written there."""
    words = list(_WORD.finditer(text))[:LONGEST_TOPIC]
    return text[: words[_length([_stem(word[0]) for word in words], topics) - 1].end()]


def _wanted(clause: str) -> Kind | None:
    return next((kind for kind, cue in CUES if cue.search(clause)), None)


def _plain(clause: str) -> Iterator[Wish]:
    """The wish of a clause that names no topic but begins with a plain form."""
    for kind, form in FORMS:
        if found := form.fullmatch(clause):
            words = frozenset(words_in(_TAILS.sub("", f" {_LEADS.sub('', found['about'])}")))
            if words:
                yield Wish(kind, words, (), clause)
            return


@lru_cache(maxsize=4_096)
def words_in(text: str) -> Words:
    """The words of a text in order, folded so that a plural is its singular."""
    return tuple(map(_stem, _WORD.findall(unicodedata.normalize("NFKC", text).casefold())))


def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def obey(instruction: str, scores: Floats, columns: Columns, bottom: float = 0.0) -> tuple[Floats, list[Obeyed]]:
    """The final scores [C] as an instruction moves them, and the wishes that are about any; `bottom` is the lowest score."""
    if not instruction.strip() or not len(scores):
        return scores, []
    category, creator = ([text[:READ_CHARS] for text in columns(name)] for name in ("category", "creator"))
    topics = [_topics(one) | _topics(made, whole=True) for one, made in zip(category, creator)]
    wishes = wishes_of(instruction, set().union(*topics))
    texts: list[tuple[frozenset[str], ...]] = [()] * len(scores)
    if any(not wish.topic for wish in wishes):
        title = [text[:READ_CHARS] for text in columns("title")]
        texts = [tuple(frozenset(words_in(text)) for text in item) for item in zip(category, creator, title)]
    moved, done = scores.copy(), list[Obeyed]()
    for wish in sorted(wishes, key=lambda one: KINDS.index(one.kind)):
        match = np.array([wish.fits(*item) for item in zip(topics, texts)], bool)
        if match.any():
            move(moved, wish.kind, match, bottom)
            done.append(Obeyed(wish, int(match.sum())))
    return (moved, done) if done else (scores, [])


@lru_cache(maxsize=4_096)
def _topics(text: str, *, whole: bool = False) -> frozenset[Words]:
    """The categories in a text, or the `whole` of it as a creator's name; one of nothing but words that wishes are made of is
    none, or a creator called "Me" would be in every second clause."""
    named = map(words_in, (text,) if whole else categories_of(text))
    return frozenset(head for head in named if len(head) <= LONGEST_TOPIC and not _SMALL.issuperset(head))


def move(scores: Floats, kind: Kind, match: Bools, bottom: float = 0.0) -> None:
    """What a wish does, in place, to the scores [C] of all items, those it is about being `match` [C]."""
    if kind == "no":
        scores[match] = bottom
    elif kind == "less":
        scores[match] = (scores[match] + bottom) / 2
    else:
        scores[match] = (1 + scores[match]) / 2
        if kind == "only":
            scores[~match] = bottom
