"""What the ranker reads: one prefix per member and task, one short row per candidate, packed as token ids.

    prefix   <|task|>question instruction  <|wish|>own instruction  <|member|>profile, connections  <|history|>entries
    item     <|item|>numbers, title, category, creator, text  [<|relation|>follows]  <|answer|>

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
KEPT_PARTS = 200_000
"""Fields whose ids are kept in memory, about 100 MB at most for titles of ordinary length."""


class LabelWordError(BrewlineError):
    """An answer word is not exactly one token."""


@dataclass(frozen=True)
class RankBudgets:
    """Tokens that each part may take. `prefix` is the whole prefix; what the rest leaves goes to the newest history."""

    item: int = 64
    entry: int = 20
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
        self._known: dict[Part, list[int]] = {}

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
        numbers = self._ids([tuple(Part(*word) for word in row) for row in words])
        return [[body[0], *row, *body[1:]][: self.budgets.item] for body, row in zip(bodies, numbers)]

    def suffix(self, relation: str = "") -> list[int]:
        """Ids that close an item: the member's relation to it, if any, then the answer token."""
        if not relation:
            return [self._answer]
        (words,) = self._ids([(Part(RELATION, neutralise(relation)),)])
        return [*words[: self.budgets.relation], self._answer]

    def prefix(self, view: MemberView, task: Task) -> list[int]:
        """Ids of all that is said before the first candidate."""
        shown = [view.history[row] for row in admitted(view.history)]
        return self.assemble(self.opening(view, task), self.entries(shown))

    def opening(self, view: MemberView, task: Task) -> list[int]:
        """Ids of the prefix up to the history: task, own wish, profile and newest connections."""
        budgets = self.budgets
        asked = (Part(TASK, neutralise(f"{task.question} {task.instruction}")),)
        wish = (Part(WISH, neutralise(view.instruction)),) if view.instruction.strip() else ()
        newest = sorted(view.connections, key=lambda edge: edge.since or 0)
        member = member_prompt(view.member, newest[max(0, len(newest) - budgets.connections) :])
        rows = self._ids([asked, wish, member])
        limits = (budgets.instruction, budgets.wish, budgets.profile)
        return [*(token for row, limit in zip(rows, limits) for token in row[:limit]), self.tokens.id(HISTORY)]

    def entries(self, history: Sequence[Engagement]) -> list[list[int]]:
        """Ids of history entries, each with what was done, cut to the budget without losing that."""
        prompts = [entry_prompt(engagement, with_action=True) for engagement in history]
        words, done = self._ids([prompt[:-1] for prompt in prompts]), self._ids([prompt[-1:] for prompt in prompts])
        most = self.budgets.entry
        return [[*row[: max(1, most - len(end))], *end][:most] for row, end in zip(words, done)]

    def assemble(self, opening: Sequence[int], entries: Sequence[Sequence[int]]) -> list[int]:
        """The prefix of an opening and all admitted entries, oldest first: the newest that fit, in steps of WINDOW_STEP."""
        row = list(opening)
        for entry in entries[first_shown([len(entry) for entry in entries], self.budgets.prefix - len(row)) :]:
            row += entry
        return row

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of each prompt. Parts are kept by content: titles, actions and profile fields come again and again."""
        missing = list({part: None for prompt in prompts for part in prompt if part not in self._known})
        if len(self._known) + len(missing) > KEPT_PARTS:
            self._known.clear()
            missing = list({part: None for prompt in prompts for part in prompt})
        self._known |= dict(zip(missing, self.tokens.many([(part,) for part in missing])))
        return [[token for part in prompt for token in self._known[part]] for prompt in prompts]


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
    """Return for each creator what the member's connection to them is called ("follows"), "" where there is none."""
    kind = {edge.other_id: edge.kind for edge in reversed(connections)}
    return [kind.get(creator, "") for creator in creators]


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
