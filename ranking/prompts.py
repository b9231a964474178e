"""What the ranker reads: one prefix per member and task, one short row per candidate, packed as token ids.

    prefix   <|task|>question instruction  [examples]  <|wish|>own instruction  <|member|>profile, connections  <|history|>entries
    item     <|item|>numbers, title, category, creator, text  [<|relation|>follows]  <|answer|>

The answer is read at <|answer|>. The question stands in the prefix, not behind each of thousands of candidates. History
entries say what was done, oldest first; which ones are shown is decided when they happen and never revised, and the window
moves in steps, so a prefix of yesterday mostly stays a prefix of today's and its keys and values can be kept. Examples stand
before all that is the member's own: members who need them share the keys and values of those too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from index.errors import BrewlineError
from ranking.shots import Shot, Shots
from ranking.tasks import Task
from retrieval.data.schema import IMPRESSION, Connection, Engagement, Item, MemberView
from retrieval.features import Quantizer
from retrieval.prompts import (
    ANSWER,
    CATEGORY,
    DID,
    ENTRY,
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
KEPT, KEPT_EACH = 12_000_000, 16
"""Characters and ids of the fields kept in memory, and what each field counts more: 400 MB at most, whatever callers invent."""


class LabelWordError(BrewlineError):
    """An answer word is not exactly one token."""


class LayoutError(BrewlineError):
    """Settings by which no history could be laid out."""


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


@dataclass(frozen=True)
class RankLayout:
    """How a history is laid out. A member with fewer than `cold` shown entries gets examples, where the ranker has any.

    `grouped`: entries stand under what was done, said once; a new entry then changes the middle of a prefix. Negative entries
    are at most `spare_negatives` ahead of positive ones when they come, and with `spare_positives` the other way round.
    `relevant` entries older than the window stand before it, those of the categories that the member came back to most; they
    change only when the window moves.
    """

    grouped: bool = False
    spare_negatives: int = SPARE_NEGATIVES
    spare_positives: int | None = None
    relevant: int = 0
    cold: int = 5

    def __post_init__(self) -> None:
        most = 1 if self.spare_positives is None else self.spare_positives
        if min(self.spare_negatives, self.relevant, self.cold) < 0 or most < 1:
            raise LayoutError(f"{self}: expected numbers of 0 or more, and of 1 or more for spare_positives")

    def facts(self) -> dict[str, int | None]:
        """The layout as plain values, for the model folder."""
        return asdict(self)

    def admitted(self, history: Sequence[Engagement]) -> list[int]:
        """The positions of the entries that a prefix shows; see `admitted`."""
        return admitted(history, self.spare_negatives, self.spare_positives)


Opening = tuple[list[int], list[int]]
"""Ids of what is asked, and of who asks: own wish, profile, newest connections."""


class RankPrompts:
    """Writes prefixes and items with one tokenizer, one quantizer, one set of budgets, one layout and the same examples."""

    def __init__(
        self,
        tokens: Tokens,
        quantizer: Quantizer,
        budgets: RankBudgets,
        layout: RankLayout = RankLayout(),
        shots: Shots | None = None,
    ) -> None:
        self.tokens, self.quantizer, self.budgets, self.layout, self.shots = tokens, quantizer, budgets, layout, shots or {}
        self._answer, self._did, self._size = tokens.id(ANSWER), tokens.id(DID), 0
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
        shown = [view.history[row] for row in self.layout.admitted(view.history)]
        return self.assemble(self.opening(view, task), shown, self.entries(shown), self.examples(task))

    def opening(self, view: MemberView, task: Task) -> Opening:
        """Ids of the prefix up to the history, without examples."""
        budgets = self.budgets
        asked = (Part(TASK, neutralise(f"{task.question} {task.instruction}")),)
        wish = (Part(WISH, neutralise(view.instruction)),) if view.instruction.strip() else ()
        newest = sorted(view.connections, key=lambda edge: edge.since or 0)
        member = member_prompt(view.member, newest[max(0, len(newest) - budgets.connections) :])
        question, *who = self._ids([asked, wish, member])
        own = [token for row, limit in zip(who, (budgets.wish, budgets.profile)) for token in row[:limit]]
        return question[: budgets.instruction], [*own, self.tokens.id(HISTORY)]

    def examples(self, task: Task, shots: Sequence[Shot] | None = None) -> list[list[int]]:
        """Ids of a task's examples, those of this ranker if none are given: title, category, and the answer's own token."""
        found = self.shots.get(task.name, ()) if shots is None else shots
        if not found:
            return []
        yes, no = (label_id(self.tokens, word) for word in (task.positive, task.negative))
        words = self._ids([(Part(ENTRY, neutralise(one.title)), Part(CATEGORY, neutralise(one.category))) for one in found])
        most = max(1, self.budgets.entry - 2)
        return [[*row[:most], self._answer, yes if one.positive else no] for row, one in zip(words, found)]

    def entries(self, history: Sequence[Engagement]) -> list[list[int]]:
        """Ids of history entries, each with what was done, cut to the budget without losing that."""
        prompts = [entry_prompt(engagement, with_action=True) for engagement in history]
        words, done = self._ids([prompt[:-1] for prompt in prompts]), self._ids([prompt[-1:] for prompt in prompts])
        most = self.budgets.entry
        return [[*row[: max(1, most - len(end))], *end][:most] for row, end in zip(words, done)]

    def assemble(
        self,
        opening: Opening,
        shown: Sequence[Engagement],
        entries: Sequence[Sequence[int]],
        examples: Sequence[Sequence[int]] = (),
    ) -> list[int]:
        """The prefix of an opening and all admitted entries with their ids, oldest first: the newest that fit, in steps of
        WINDOW_STEP. Examples fill what a cold member's history leaves, the last ones giving way first."""
        asked, own = opening
        room = self.budgets.prefix - len(asked) - len(own)
        rows = [entries[row] for row in self._window(shown, [len(entry) for entry in entries], room)]
        told: list[int] = []
        if len(shown) < self.layout.cold:
            room -= sum(map(len, rows))
            for example in examples:
                if len(told) + len(example) > room:
                    break
                told += example
        return [*asked, *told, *own, *(token for row in (self._grouped(rows) if self.layout.grouped else rows) for token in row)]

    def _window(self, shown: Sequence[Engagement], lengths: Sequence[int], room: int) -> list[int]:
        """The positions of the entries that a prefix has room for, oldest first."""
        start, kept = first_shown(lengths, room), self.layout.relevant
        if not kept or not start:
            return list(range(start, len(lengths)))
        start = first_shown(lengths, room - kept * self.budgets.entry)
        return [*most_relevant(shown[:start], kept), *range(start, len(lengths))]

    def _grouped(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The entries under what was done with them, in the order in which each thing was done first."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            at = list(row).index(self._did)
            groups.setdefault(tuple(row[at:]), []).extend(row[:at])
        return [[*done, *words] for done, words in groups.items()]

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of each prompt. Parts are kept by content: titles, actions and profile fields come again and again."""
        if self._size > KEPT:
            self._known, self._size = {}, 0
        known = self._known
        missing = list({part: None for prompt in prompts for part in prompt if part not in known})
        ids = self.tokens.many([(part,) for part in missing])
        self._size += sum(KEPT_EACH + len(part.text) + len(row) for part, row in zip(missing, ids))
        known.update(zip(missing, ids))
        return [[token for part in prompt for token in known[part]] for prompt in prompts]


def admitted(
    history: Sequence[Engagement], spare_negatives: int = SPARE_NEGATIVES, spare_positives: int | None = None
) -> list[int]:
    """Return the positions of the entries that a prefix shows, decided from the past of each alone.

    An item is shown once, at its first engagement; one that was passed over or disliked only while such entries are not
    more than `spare_negatives` ahead of the positive ones, and the other way round if `spare_positives` says so. Impressions
    without a negative label say nothing and are left out.
    """
    shown: list[int] = []
    seen: set[str] = set()
    ahead = 0  # positive entries less negative ones
    for row, engagement in enumerate(history):
        negative = engagement.label == 0
        if engagement.item.item_id in seen or (engagement.action == IMPRESSION and not negative):
            continue
        if (-ahead >= spare_negatives) if negative else (spare_positives is not None and ahead >= spare_positives):
            continue
        ahead += -1 if negative else 1
        seen.add(engagement.item.item_id)
        shown.append(row)
    return shown


def most_relevant(past: Sequence[Engagement], count: int) -> list[int]:
    """Return the positions, rising, of the entries that say most about a member: those they did not pass over, of the
    categories with the most such entries less the others, the newest first. Which ones depends on `past` alone."""
    worth: dict[str, int] = {}
    for one in past:
        worth[one.item.category] = worth.get(one.item.category, 0) + (-1 if one.label == 0 else 1)
    liked = [row for row, one in enumerate(past) if one.label != 0]
    return sorted(sorted(liked, key=lambda row: (worth[past[row].item.category], row))[len(liked) - min(count, len(liked)) :])


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
