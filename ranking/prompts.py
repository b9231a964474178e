"""What the ranker reads: one prefix per member and task, one short row per candidate, packed as token ids.

    prefix   <|task|>instruction question  <|wish|>own instruction  <|member|>profile, connections  <|history|>entries
    item     <|item|>numbers, title, category, creator, text  [<|relation|>follows the author]  <|answer|>

The answer is read at <|answer|>. The question stands in the prefix, not behind each of thousands of candidates. History
entries say what was done, oldest first; which ones are shown is decided when they happen and never revised, and the window
moves in steps, so a prefix of yesterday mostly stays a prefix of today's and its keys and values can be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from index.errors import BrewlineError
from ranking.tasks import Task
from retrieval.data.schema import IMPRESSION, Connection, Engagement, Item, MemberView
from retrieval.features import Quantizer
from retrieval.prompts import (
    ANSWER,
    HISTORY,
    RELATION,
    TASK,
    WISH,
    Part,
    Prompt,
    entry_prompt,
    item_prompt,
    member_prompt,
    neutralise,
    number_words,
)
from retrieval.tokens import Tokens

RANK_TEMPLATE = 1
"""Raise it with any change of what the functions below return: it is part of every ranker's fingerprint."""
WINDOW_STEP = 4
"""The oldest shown entry is always a multiple of this: fewer first entries means fewer lost prefixes."""
SPARE_NEGATIVES = 2
"""How many more negative than positive entries a history may show."""
CACHED_ENTRIES = 100_000


class LabelWordError(BrewlineError):
    """An answer word is not exactly one token."""


@dataclass(frozen=True)
class RankBudgets:
    """Tokens that each part may take. `prefix` is the whole prefix; what the rest leaves goes to the newest history."""

    item: int = 64
    entry: int = 16
    instruction: int = 32
    wish: int = 48
    profile: int = 48
    relation: int = 8
    prefix: int = 256
    connections: int = 2

    def facts(self) -> dict[str, int]:
        """The budgets as plain numbers, for the model folder."""
        return asdict(self)


class RankPrompts:
    """Writes prefixes and items with one tokenizer, one quantizer and one set of budgets."""

    def __init__(self, tokens: Tokens, quantizer: Quantizer, budgets: RankBudgets) -> None:
        self.tokens, self.quantizer, self.budgets = tokens, quantizer, budgets
        self._answer = tokens.id(ANSWER)
        self._entries: dict[Prompt, list[int]] = {}
        self._suffixes: dict[str, list[int]] = {}

    def items(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        """Ids of N items. `numbers` name -> float [N]: as-of numbers; an item's own static numbers are added here."""
        columns = dict(numbers)
        for name in self.quantizer.names:
            if name not in columns:
                columns[name] = np.array([item.numbers.get(name, np.nan) for item in items], np.float64)
        return self.with_numbers(self.bodies(items), columns)

    def bodies(self, items: Sequence[Item]) -> list[list[int]]:
        """Ids of N items without numbers: what does not change from day to day."""
        return self.tokens.many([item_prompt(item, ()) for item in items])

    def with_numbers(self, bodies: Sequence[Sequence[int]], columns: Mapping[str, np.ndarray]) -> list[list[int]]:
        """The bodies of N items with their numbers (name -> float [N]) after the opening token, cut to the budget."""
        words = number_words(self.quantizer, columns, len(bodies))
        numbers = self.tokens.many([tuple(Part(*word) for word in row) for row in words])
        return [[body[0], *row, *body[1:]][: self.budgets.item] for body, row in zip(bodies, numbers)]

    def suffix(self, relation: str = "") -> list[int]:
        """Ids that close an item: the member's relation to it, if any, then the answer token."""
        if relation not in self._suffixes:
            words = self.tokens.ids((Part(RELATION, neutralise(relation)),)) if relation else []
            self._suffixes[relation] = [*words[: self.budgets.relation], self._answer]
        return self._suffixes[relation]

    def prefix(self, view: MemberView, task: Task) -> list[int]:
        """Ids of all that is said before the first candidate."""
        shown = [view.history[row] for row in admitted(view.history)]
        return self.assemble(self.opening(view, task), [self.entry(engagement) for engagement in shown])

    def opening(self, view: MemberView, task: Task) -> list[int]:
        """Ids of the prefix up to the history: task, own wish, profile and newest connections."""
        budgets, ids = self.budgets, self.tokens.ids
        row = ids((Part(TASK, neutralise(f"{task.instruction} {task.question}")),))[: budgets.instruction]
        if view.instruction.strip():
            row += ids((Part(WISH, neutralise(view.instruction)),))[: budgets.wish]
        newest = sorted(view.connections, key=lambda edge: edge.since or 0)
        row += ids(member_prompt(view.member, newest[max(0, len(newest) - budgets.connections) :]))[: budgets.profile]
        return [*row, self.tokens.id(HISTORY)]

    def assemble(self, opening: Sequence[int], entries: Sequence[Sequence[int]]) -> list[int]:
        """The prefix of an opening and all admitted entries, oldest first: the newest that fit, in steps of WINDOW_STEP."""
        row = list(opening)
        for entry in entries[first_shown([len(entry) for entry in entries], self.budgets.prefix - len(row)) :]:
            row += entry
        return row

    def entry(self, engagement: Engagement) -> list[int]:
        """Ids of one history entry with what was done, cut to the budget without losing that. Kept by content."""
        prompt = entry_prompt(engagement, with_action=True)
        if prompt not in self._entries:
            if len(self._entries) >= CACHED_ENTRIES:
                self._entries.clear()
            done = self.tokens.ids(prompt[-1:])
            words = self.tokens.ids(prompt[:-1])[: max(1, self.budgets.entry - len(done))]
            self._entries[prompt] = (words + done)[: self.budgets.entry]
        return self._entries[prompt]


def admitted(history: Sequence[Engagement]) -> list[int]:
    """Return the positions of the entries that a prefix shows, decided from the past of each alone.

    An item is shown once, at its first engagement; one that was passed over or disliked only while such entries are not
    more than SPARE_NEGATIVES ahead of the positive ones. Impressions without a negative label say nothing and are left out.
    """
    shown: list[int] = []
    seen: set[str] = set()
    positives = negatives = 0
    for row, engagement in enumerate(history):
        negative = engagement.label == 0
        if engagement.item.item_id in seen or (engagement.action == IMPRESSION and not negative):
            continue
        if negative and negatives >= positives + SPARE_NEGATIVES:
            continue
        negatives, positives = negatives + negative, positives + (not negative)
        seen.add(engagement.item.item_id)
        shown.append(row)
    return shown


def first_shown(lengths: Sequence[int], budget: int) -> int:
    """Return the smallest multiple of WINDOW_STEP from which on all entries fit the budget (at most the whole length)."""
    start, used = len(lengths), 0
    for row in range(len(lengths) - 1, -1, -1):
        used += lengths[row]
        if used > budget:
            break
        if row % WINDOW_STEP == 0:
            start = row
    return start


def relations_of(connections: Sequence[Connection], creators: Sequence[str]) -> list[str]:
    """Return for each creator the member's relation in words ("follows the author"), "" where there is none."""
    kind = {edge.other_id: edge.kind for edge in reversed(connections)}
    return [f"{kind[creator]} the author" if creator in kind else "" for creator in creators]


def label_id(tokens: Tokens, word: str) -> int:
    """Return the id of an answer word: its own special token if there is one, else its only token. Raises LabelWordError."""
    own = tokens.tokenizer.token_to_id(label_token(word))
    if own is not None:
        return int(own)
    ids = tokens.text_ids(word)
    if len(ids) != 1:
        raise LabelWordError(f'the answer word "{word}" is {len(ids)} tokens for this tokenizer; choose a word that is one')
    return ids[0]


def label_token(word: str) -> str:
    """The special token that stands for an answer word in a tokenizer that has no single token for it."""
    return f"<|{word}|>"
