"""What a member says they want, read by rule and obeyed after the models.

A ranker of a few million weights, made from one log, does not follow words: what it was taught of wishes moved nothing
(docs/tasks.md has the figures). A member who says "no politics" must not depend on that. So plain English is read here and moves
the final score of the items that it is about.

    more X    odds times FACTOR        less X    odds divided by it
    no X      to the bottom            only X    everything else to the bottom

X is a whole category or creator of a candidate. A clause that names one says by its other words what it wants (CUES, the first
that is found counts). Silence is the safe mistake: questions, two topics in one clause, two negations, or a negation beside
"only" are read as nothing. Where wishes meet, the stricter one counts: they apply in the order more, less, only, no.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrieval.pooled_rate import categories_of

Kind = Literal["more", "only", "less", "no"]
KINDS: tuple[Kind, ...] = ("more", "only", "less", "no")
FACTOR = 5.0
"""Odds of a score between the bottom and 1: a few times the distance between neighbours, so that "more" is no "only"."""
MOST_WISHES, READ_CHARS, LONGEST_TOPIC = 32, 256, 8
"""Wishes of one instruction, characters of a category or creator, and words of one."""

Floats = npt.NDArray[np.float32]
Words = tuple[str, ...]
Topics = frozenset[Words]

_NEAR = r"(?:[\w'%&-]+ ){0,4}"
_REST = rf"(?:everything|anything|all)(?: else)? (?:but|except|besides|beside|outside|apart from|other than) {_NEAR}X"
_VERBS = r"want|show|give|need|see|get|recommend|suggest|interested|like|me|to|in|things|stuff|items|about|that are|from|please"
_AWAY = r"hide|remove|delete|rid of|exclude|block|skip|drop|quit|avoid|mute|ban|ditch|hate|loathe|dislike|unfollow|spare me|zero"
_DONT = r"(?:n't|\bdo not|\bnever|\bno longer)"
_LIMIT = r"only|just|solely|purely|exclusively|strictly|limit|restrict"
_NEGATION = re.compile(
    rf"n't\b|\b(?:no|not|never|nothing|none|nope|without|{_AWAY}|hiding|removing|blocking|stop\w*|tired|sick|bored|fed up|done|"
    r"enough|opt out)\b"
)
_CUES: tuple[tuple[Kind | None, str], ...] = (
    (None, r"^(?:what|how (?!about)|who|when|where|why|which|did|does|do you|has|have you|is|are (?!you able))\b"),
    (None, r"\b(?:mind|miss|doubt|problem|used to|break from|unless|gone|tagged|spelled|labelled|pictures?|page|link|list)\b"),
    ("more", r"\bcan(?:no|')t get enough of X|^(?:i want )?not enough X|\byou (?:never|hardly|rarely) (?:show|give|recommend)\b"),
    ("only", rf"\b(?:{_AWAY}|no|not|don't|do not|nothing)\b.*\b{_REST}"),
    ("only", r"\b(?:everything|anything|all)\b.* (?:isn't|is not|aren't) X"),
    ("only", r"\bif it(?:'s| is) not X|\bnothing (?:but|except) X|\bX and nothing else\b|^(?:just )?100% X|^all X\b"),
    ("no", rf"\b{_REST}"),
    (None, r"\b(?:other|rather|instead|than|except)\b|\b(?:no|not|never)\b.*\b(?:less|fewer)\b|n't\b.*\b(?:less|fewer)\b"),
    ("less", r"\b(?:less|fewer|smaller|too (?:much|many|often)|(?:so|this|that|as|quite) (?:much|many|often|hard))\b"),
    ("less", r"\b(?:reduce|lower|decrease|in moderation|sparingly|go easy|overdo\w*|minim(?:um|i[sz]e|al))\b"),
    ("less", r"\b(?:cut|dial|tone|scale|ease|slow)\b.* (?:down|back|off|up on)\b|\bturn\b.* down\b"),
    ("less", r"\benough\b.* for (?:a while|now)\b"),
    ("less", r"\b(?:once in a while|now and then|occasional(?:ly)?|rarely|seldom)\b"),
    ("less", r"\b(?:a (?:little|bit)|kind of|kinda|somewhat|getting) (?:tired|sick|bored)\b"),
    ("less", r"\bnot (?:a |that |so |such a |very |really )+(?:huge|big|great|into|keen|interested|fond)\b"),
    (None, rf"(?:n't\b|\b(?:no|not|never|stop\w*|tired|sick|more than)\b).*\b(?:{_LIMIT})\b"),
    ("only", rf"\b(?:{_LIMIT})(?: (?:{_VERBS}))* X(?! gone)|\bX (?:only|exclusively)\b"),
    ("only", r"\b(?:limit|restrict|stick|narrow)\b.*\bto X"),
    (None, rf"\b(?:{_LIMIT})\b"),
    ("no", r"\b(?:no|no more|not|not any|without|without any|nope to|zero) X"),
    ("no", rf"\b(?:{_AWAY}|opt out of|stop(?: \w+ing)?(?: with)?) {_NEAR}X"),
    ("no", rf"{_DONT}(?: ever| really)? (?:want|need|like|show|give|recommend|suggest|care for|stand) {_NEAR}X"),
    ("no", rf"\bnot (?:interested in|into|a fan of|keen on) {_NEAR}X|\b(?:can't|cannot) stand {_NEAR}X"),
    ("no", rf"\b(?:sick|tired|bored|done|enough)(?: of| with) {_NEAR}X"),
    ("no", r"\b(?:get|take|leave|keep|filter|turn|switch) (?:[\w'-]+ ){0,2}X(?: [\w'-]+){0,2} (?:off|out|away)\b"),
    ("no", r"\bX (?:is|are) not for me\b"),
    ("no", r"\b(?:leave|filter|turn|switch|keep) (?:out|off|away) (?:[\w'-]+ ){0,2}X"),
    (None, _NEGATION.pattern),
    ("more", rf"\b(?:more|love|like|enjoy|into|want|need|show|give|recommend|see|add|increase|boost|prefer|feed me) {_NEAR}X"),
    ("more", rf"\b(?:plenty of|lots of|extra|fan of|mood for|looking for|interested in|crav(?:e|ing)|focus) {_NEAR}X"),
    ("more", rf"\b(?:turn up|surprise me with|how about|keen on|fond of|some|please) {_NEAR}X"),
    ("more", r"\bX (?:please|pls|plz|suggestions|is great)"),
)  # fmt: skip
CUES = tuple((kind, re.compile(cue)) for kind, cue in _CUES)
"""What the words beside X want of it, X being in their place; None: nothing that is surely understood."""
_SECOND = r" (?=(?:more|less|fewer|no|not|without|only|just|too much|instead|rather|than)\b[^\x00]*\x00)"
_BREAKS = re.compile(
    r"([,;.!?\n:()/+\u2013\u2014]+| & | - |(?<!thing)(?<! all) but | and (?!nothing else)| or | so (?!much|many|often)| then |"
    rf"(?<=\x00){_SECOND})"
)
_ON = re.compile(r"\s*(?:,|/|&|and|or)?\s*")
"""Breaks that a list goes on behind."""
_WORD = re.compile(r"\w+[+#]*")
_TOPIC = re.compile("\x00(\\d+)\x00")
_WITHIN = re.compile(r"[\s&'/-]*")
"""What may stand between two words of one topic."""
_CONTRACTED = re.compile(r"\b(do|did|does|is|are|was|were|wo|ca|would|could|should|have|has)nt\b")
_ARTICLES = frozenset(("the", "a", "an"))
_SMALL = frozenset(
    _WORD.findall(
        "i me my we you your it its that this these those of on in to for from with about and or but so any some all every "
        "everything anything nothing more less fewer only just no not never without much many too please show want see like love "
        "give need get hide stop skip don t do m ve d is are be can could would will thing stuff item else again general other "
        "live new best top hope thank up out off time now today home recommendation suggestion mix various misc fine great good "
        "ok enough than"
    )
)
"""Words, folded, that wishes are made of: no topic consists of them, begins or ends with one."""
_AS_THEY_ARE = frozenset(("news", "series", "species", "goods"))


@dataclass(frozen=True, slots=True)
class Wish:
    """What a member wants of the items of a `topic`, the words of a category or creator; `said` is the clause that says it."""

    kind: Kind
    topic: Words
    said: str


@dataclass(frozen=True, slots=True)
class Obeyed:
    """A wish, and how many candidates it is about."""

    wish: Wish
    items: int


@dataclass(frozen=True)
class Final:
    """Final scores float32 [C], what they were before the `wishes` moved them, and these."""

    own: Floats
    scores: Floats
    wishes: Sequence[Obeyed] = ()

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """Int64 [C]: the best first. What a wish sent to the bottom keeps its order there; then the order given counts."""
        return np.lexsort((-self.own, -self.scores))


def wishes_of(instruction: str, known: Collection[Words]) -> list[Wish]:
    """The wishes of an instruction about topics that are `known`, each once, in the order in which they were said."""
    text = re.sub("[\u2019\u2018\u02bc\u00b4`]", "'", instruction).replace("\x00", " ")
    text = _CONTRACTED.sub(r"\1n't", unicodedata.normalize("NFKC", text).casefold())
    marked, topics = _marked(text, known)
    found: dict[tuple[Kind, Words], Wish] = {}
    last: Kind | None = None
    parts = _BREAKS.split(marked)
    for before, part in zip(("", *parts[1::2]), parts[::2]):
        clause = " ".join(part.split())
        named = [int(place) for place in _TOPIC.findall(clause)]
        if not named:
            last = last if not clause else None
            continue
        goes_on = _TOPIC.fullmatch(clause) and _ON.fullmatch(before)
        last = last if goes_on else _wanted(_TOPIC.sub("X", clause)) if len(named) == 1 else None
        if last is not None and len(found) < MOST_WISHES:
            topic = topics[named[0]][0]
            found.setdefault((last, topic), Wish(last, topic, _TOPIC.sub(lambda at: topics[int(at[1])][1], clause)))
    return list(found.values())


def _marked(text: str, known: Collection[Words]) -> tuple[str, list[tuple[Words, str]]]:
    """The text with each topic, the longest first, as its number between zero bytes; and the topics, folded and as written."""
    words = list(_WORD.finditer(text))
    folded = [_folded(word[0]) for word in words]
    parts, topics, end, place = list[str](), list[tuple[Words, str]](), 0, 0
    while place < len(words):
        size = _longest(text, words[place : place + LONGEST_TOPIC], folded[place : place + LONGEST_TOPIC], known)
        if size:
            first, after = words[place].start(), words[place + size - 1].end()
            parts += [text[end:first], f"\x00{len(topics)}\x00"]
            topics.append((tuple(folded[place : place + size]), text[first:after]))
            end = after
        place += max(1, size)
    return "".join([*parts, text[end:]]), topics


def _longest(text: str, words: Sequence[re.Match[str]], folded: Sequence[str], known: Collection[Words]) -> int:
    """How many of these words make a known topic, standing together; 0 if none do."""
    near = 1
    while near < len(words) and _WITHIN.fullmatch(text, words[near - 1].end(), words[near].start()):
        near += 1
    return next((size for size in range(min(near, len(words)), 0, -1) if tuple(folded[:size]) in known), 0)


def _wanted(clause: str) -> Kind | None:
    found = next((kind for kind, cue in CUES if cue.search(clause)), None)
    return None if found == "no" and len(_NEGATION.findall(clause)) > 1 and not re.search(_REST, clause) else found


def _folded(word: str) -> str:
    """The same for a singular and its plural."""
    if word in _AS_THEY_ARE or len(word) <= 3:
        return word
    singular = word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
    return f"{singular[:-2]}y" if singular.endswith("ie") else singular


def topics_of(category: str, creator: str) -> Topics:
    """The topics of an item. A name that begins or ends with words that wishes are made of ("Just Jazz") is none: it would be
    found where somebody wishes just jazz."""
    return _topics(category[:READ_CHARS], creator[:READ_CHARS])  # what is remembered is short


@lru_cache(maxsize=4_096)
def _topics(category: str, creator: str) -> Topics:
    found = set[Words]()
    for name in (*categories_of(category), creator):
        words = [_folded(word) for word in _WORD.findall(unicodedata.normalize("NFKC", name).casefold())]
        words = words[1:] if words and words[0] in _ARTICLES else words
        if 0 < len(words) <= LONGEST_TOPIC and words[0] not in _SMALL and words[-1] not in _SMALL:
            found.add(tuple(words))
    return frozenset(found)


def obey(
    instruction: str, scores: Floats, topics: Sequence[Topics], bottom: float = 0.0, known: Topics = frozenset()
) -> tuple[Floats, list[Obeyed]]:
    """The final scores [C] of items of these topics [C] as an instruction moves them, and the wishes that are about any.

    `bottom` is the lowest score there is; topics `known` beside those of the items are understood, too.
    """
    wishes = wishes_of(instruction, known.union(*topics))
    match = {wish: np.array([wish.topic in one for one in topics], bool) for wish in wishes}
    moved = scores.astype(np.float64)
    for wish in wishes:
        if wish.kind in ("more", "less"):
            moved[match[wish]] = _shifted(moved[match[wish]], FACTOR if wish.kind == "more" else 1 / FACTOR, bottom)
    only = [match[wish] for wish in wishes if wish.kind == "only"]
    if only:
        moved[~np.any(only, axis=0)] = bottom
    for wish in wishes:
        if wish.kind == "no":
            moved[match[wish]] = bottom
    done = [Obeyed(wish, int(match[wish].sum())) for wish in wishes if wish.kind == "only" or match[wish].any()]
    return (moved.astype(np.float32), done) if done else (scores, [])


def _shifted(scores: npt.NDArray[np.float64], factor: float, bottom: float) -> npt.NDArray[np.float64]:
    """The scores with their odds, between the bottom and 1, times a factor."""
    share = np.clip((scores - bottom) / (1 - bottom), 0.0, 1.0)
    return bottom + (1 - bottom) * factor * share / (1 + (factor - 1) * share)
