"""A record becomes words: fixed fields in a fixed order, each opened by its own token, numbers as bucket words.

A prompt is a tuple of parts, each a field token followed by plain text. Field tokens are single vocabulary entries that no
text can spell: `neutralise` breaks them in the text, and `retrieval.tokens` encodes text with special tokens switched off.
The two walls are independent; a test attacks each alone. Field order puts what must survive truncation first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from retrieval.data.schema import IMPRESSION, Connection, Engagement, Item, Member
from retrieval.features import Quantizer

TEMPLATE_VERSION = 1
"""Raise it with any change of what the functions below return: it is part of every model's fingerprint."""

ITEM, TITLE, CATEGORY, CREATOR, TEXT = "<|item|>", "<|title|>", "<|category|>", "<|creator|>", "<|text|>"
MEMBER, PROFILE, CONNECTION, HISTORY, ENTRY = "<|member|>", "<|profile|>", "<|connection|>", "<|history|>", "<|entry|>"
DID, TASK, WISH, RELATION, ANSWER = "<|did|>", "<|task|>", "<|wish|>", "<|relation|>", "<|answer|>"
PAD = "<|pad|>"
FIELD_TOKENS = (
    PAD, ITEM, TITLE, CATEGORY, CREATOR, TEXT, MEMBER, PROFILE, CONNECTION, HISTORY, ENTRY, DID, TASK, WISH, RELATION, ANSWER,
)  # fmt: skip
MAX_FIELD_CHARS = 4_000
"""Characters of one field that are looked at: token budgets cut far earlier, and a huge field must not cost its length."""
PASSED_OVER = "passed over"

_BLANKS = re.compile(r"[\s\x00-\x1f\x7f]+")


class Part(NamedTuple):
    """A field token and the plain text that follows it ("" for bucket tokens and openers)."""

    token: str
    text: str


Prompt = tuple[Part, ...]


def neutralise(text: str) -> str:
    """The text without anything that could be read as a field token, on one line, at most MAX_FIELD_CHARS long."""
    plain = _BLANKS.sub(" ", text[: 2 * MAX_FIELD_CHARS]).strip()[:MAX_FIELD_CHARS]
    plain = plain.encode("utf-8", "replace").decode("utf-8")
    return apart(plain)


def apart(plain: str) -> str:
    """The text with each delimiter of field tokens broken in two."""
    return plain.replace("<|", "< |").replace("|>", "| >")


def item_prompt(item: Item, numbers: Sequence[tuple[str, str]]) -> Prompt:
    """The item as it is embedded and ranked: numbers (from `number_words`), title, category, creator, text."""
    parts = [Part(ITEM, ""), *(Part(token, text) for token, text in numbers)]
    named = ((TITLE, item.title), (CATEGORY, item.category), (CREATOR, item.creator), (TEXT, item.text))
    parts += [Part(token, plain) for token, text in named if (plain := neutralise(text))]
    return tuple(parts)


def entry_prompt(engagement: Engagement, *, with_action: bool, whole_item: bool = False) -> Prompt:
    """One history entry: the item's title and category, with `whole_item` its creator and text, and with `with_action` what the
    member did."""
    item = engagement.item
    parts = [Part(ENTRY, neutralise(item.title) or neutralise(item.text))]
    if item.category:
        parts.append(Part(CATEGORY, neutralise(item.category)))
    if whole_item:
        parts += [
            Part(token, plain) for token, text in ((CREATOR, item.creator), (TEXT, item.text)) if (plain := neutralise(text))
        ]
    if with_action:
        parts.append(Part(DID, action_words(engagement.action, engagement.label)))
    return tuple(parts)


def member_prompt(member: Member, connections: Sequence[Connection]) -> Prompt:
    """What opens every member prompt: profile fields in their own order, then connections as words."""
    parts = [Part(MEMBER, "")]
    parts += [Part(PROFILE, neutralise(f"{name}: {text}")) for name, text in member.profile.items() if text.strip()]
    parts += [Part(CONNECTION, neutralise(f"{edge.kind} {edge.other_id}")) for edge in connections]
    return tuple(parts)


def action_words(action: str, label: int | None) -> str:
    """Words for an action: "rating:8" reads "8", an impression that was not engaged reads "passed over"."""
    if action == IMPRESSION:
        return "seen" if label else PASSED_OVER
    kind, _, detail = action.partition(":")
    return neutralise(detail or kind)


def number_words(quantizer: Quantizer, numbers: Mapping[str, np.ndarray], n: int) -> list[list[tuple[str, str]]]:
    """(token, text) of every number field of n items, in the quantizer's order; a field that is not given is missing."""
    missing = np.full(n, np.nan)
    columns = [quantizer.words(name, numbers.get(name, missing)) for name in quantizer.names]
    return [list(row) for row in zip(*columns)] if columns else [[] for _ in range(n)]


def render(prompt: Prompt) -> str:
    """The prompt as one string, as a tokenizer with the same special tokens reads it."""
    return "".join(part.token + part.text for part in prompt)


def special_tokens(quantizer: Quantizer) -> list[str]:
    """Every token that prompts written with this quantizer can contain, in vocabulary order."""
    return [*FIELD_TOKENS, *quantizer.tokens()]
