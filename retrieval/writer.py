"""Records become the id rows that a trunk reads: one item, or one member with as much history as the budget holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from retrieval.data.schema import IMPRESSION, Engagement, Item, MemberView, action_kind
from retrieval.features import Quantizer
from retrieval.prompts import HISTORY, Part, Prompt, entry_prompt, item_prompt, member_prompt, number_words
from retrieval.tokens import Tokens, keep_newest


@dataclass(frozen=True)
class Budgets:
    """Tokens that one row may hold. `member` includes the profile; the rest goes to the newest history entries, each of them
    title and category, with `whole_entries` creator and text as well."""

    item: int = 64
    entry: int = 16
    profile: int = 64
    member: int = 224
    connections: int = 4
    whole_entries: bool = False

    def facts(self) -> dict[str, int]:
        """The budgets as plain numbers, for the model folder."""
        return asdict(self)


@dataclass(frozen=True)
class Writer:
    """Writes items and members with one tokenizer, one quantizer and one set of budgets.

    `actions`: kinds of action that count as engagement; a member row shows these and nothing else of the history (empty: every
    action but impressions). `whole`: member rows show the other actions too and say of each what was done; what is
    handed in must then hold them (`retrieval.learn.whole`).
    """

    tokens: Tokens
    quantizer: Quantizer
    budgets: Budgets
    actions: tuple[str, ...] = ()
    whole: bool = False

    def items(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        """Id rows of items. `numbers` name -> float [N]: as-of numbers; an item's own static numbers are added here."""
        columns = dict(numbers)
        for name in self.quantizer.names:
            if name not in columns:
                columns[name] = np.array([item.numbers.get(name, np.nan) for item in items], np.float64)
        words = number_words(self.quantizer, columns, len(items))
        prompts = [item_prompt(item, row) for item, row in zip(items, words)]
        return [ids[: self.budgets.item] for ids in self.tokens.many(prompts)]

    def entries(self, history: Sequence[Engagement]) -> list[list[int]]:
        """Id rows of history entries as the budgets have them, and in a whole history what was done, which is never cut off."""
        prompts = [
            entry_prompt(engagement, with_action=self.whole, whole_item=self.budgets.whole_entries) for engagement in history
        ]
        if not self.whole:
            return [ids[: self.budgets.entry] for ids in self.tokens.many(prompts)]
        words, did = self.tokens.many([prompt[:-1] for prompt in prompts]), self.tokens.many([prompt[-1:] for prompt in prompts])
        return [ids[: max(1, self.budgets.entry - len(end))] + end for ids, end in zip(words, did)]

    def profile(self, view: MemberView) -> list[int]:
        """What opens the member's row: profile, connections, the history's opening token."""
        newest = sorted(view.connections, key=lambda edge: edge.since or 0)[-self.budgets.connections :]
        opening: Prompt = member_prompt(view.member, newest)
        return self.tokens.ids(opening)[: self.budgets.profile - 1] + self.tokens.ids((Part(HISTORY, ""),))

    def member(self, opening: Sequence[int], entries: Sequence[Sequence[int]]) -> list[int]:
        """One member row: the opening, then the newest entries that fit, oldest first."""
        row = list(opening)
        for entry in keep_newest(entries, self.budgets.member - len(row)):
            row += entry
        return row

    def members(self, views: Sequence[MemberView]) -> list[list[int]]:
        """Id rows of members: engagements only, each item where it comes first in the history handed in.

        A view's history is the newest `records.NEWEST` engagements (`records.view_of`); training cuts its log in the same way.
        """
        return [self.member(self.profile(view), self.entries(self._shown(view.history))) for view in views]

    def _shown(self, history: Sequence[Engagement]) -> list[Engagement]:
        first: dict[str | int, Engagement] = {}
        for place, engagement in enumerate(history):
            kind = action_kind(engagement.action)
            if kind in self.actions if self.actions else kind != IMPRESSION:
                first.setdefault(engagement.item.item_id, engagement)
            elif self.whole:
                first[place] = engagement
        # An entry has at least one token, so older ones can never fit.
        return list(first.values())[-self.budgets.member :]
