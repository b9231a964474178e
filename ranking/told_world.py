"""What a reader of a synthetic world's log is told: topics, laws and the meaning of words, but nothing hidden about anybody.

Not told: anybody's interests, tastes or ease, any post's quality or length of life, the fashions, and every probability of the
log. Legend: M members, N items, K topics, n rows, B bins of the fit, T words in profiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from retrieval.data.schema import DAY, Dataset
from retrieval.data.world import Truth
from retrieval.data.world_truth import Law

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BINS = 64
HIDDEN_SPREAD = 0.5
"""Standard deviation of what taste, quality and ease add to a want: none of them is told."""
FOLDS, ROUNDS, DOUBT = 8, 8, 5.0
"""Parts of the members; rounds in which the meanings of words settle; uses of a word that the topics' shares alone are worth."""
FEW_DIE_LATE = 0.05
"""Share of posts that stay long; which ones is not told."""


@dataclass(frozen=True)
class Told:
    """A world as it is told, for the members and items of `dataset`."""

    dataset: Dataset
    truth: Truth

    @cached_property
    def topic(self) -> Ints:
        """Int64 [N, 2]: each post's main topic and its second one."""
        return np.argsort(-self.truth.phi, axis=1, kind="stable")[:, :2]

    @cached_property
    def share(self) -> Singles:
        """Float32 [N, 2]: how much of the post the two are."""
        return np.take_along_axis(self.truth.phi, self.topic, axis=1).astype(np.float32)

    @cached_property
    def table(self) -> Singles:
        """Float32 [2 * slots * F * 2 * B]: P(label) by label, slot, format, connection and fit, hidden things averaged out."""
        return label_table(self.truth.law).ravel().astype(np.float32)

    def code(self, label: Ints, slot: Ints, item: Ints, connected: npt.NDArray[np.bool_]) -> Ints:
        """Int64 [n]: where a row's bins begin in `table`."""
        law = self.truth.law
        formats = len(law.format_extra[0])
        return (((label * law.slots + slot) * formats + self.truth.format[item]) * 2 + connected) * BINS

    def probability(self, code: Ints, fit: npt.NDArray[np.floating]) -> Singles:
        """Float32, shape of `fit` [..., n]: P(the label that the codes [n] are about)."""
        return self.table[code + (fit * (BINS - 0.01)).astype(np.int64)]

    def moved(self, time: Ints) -> Singles:
        """Float32 [n]: how much of the first interest's weight has gone to the new one."""
        truth = self.truth
        return (np.clip((time - truth.start) / (len(truth.trend) * DAY), 0, 1) * truth.law.drift).astype(np.float32)

    def fit(self, interest: npt.NDArray[np.floating], item: Ints) -> npt.NDArray[np.floating]:
        """[n]: the fit of interests [n, K] and items, as the law has it."""
        row = np.arange(len(item))
        pull = sum(interest[row, self.topic[item, place]] * self.share[item, place] for place in (0, 1))
        return np.asarray(1 - np.exp2(-pull / self.truth.law.half_affinity))

    def connected(self, member: Ints, item: Ints, time: Ints) -> npt.NDArray[np.bool_]:
        """Bool [n]: the member knew the item's author before the time."""
        truth = self.truth
        count = len(truth.theta_first)
        key = truth.edge_member.astype(np.int64) * count + truth.edge_other
        if not len(key):
            return np.zeros(len(member), bool)
        order = np.argsort(key)
        asked = member * count + truth.author[item]
        at = order[np.minimum(np.searchsorted(key[order], asked), len(key) - 1)]
        return np.asarray((key[at] == asked) & (truth.edge_since[at] < time))

    def stock(self, day: int) -> Floats:
        """Float64 [M, K]: shares of the main topics in what could be shown to each member around noon of a day, fit apart.

        Quality, fashion and which posts stay long are left out, since nobody told them.
        """
        truth, law = self.truth, self.truth.law
        age = (day * DAY + DAY // 2 - truth.created) / DAY
        old = np.maximum(age, 0)
        short = (1 - FEW_DIE_LATE) * (age < law.life) * np.exp(-old / law.fade)
        weight = np.where(age >= 0, (1 - np.exp(-old / law.ramp)) * (short + FEW_DIE_LATE * np.exp(-old / law.evergreen_fade)), 0)
        size = truth.theta_first.shape
        by_author = np.bincount(truth.author * size[1] + self.topic[:, 0], weight, size[0] * size[1]).reshape(size)
        met = truth.edge_since < day * DAY
        ends = truth.edge_member[met], truth.edge_other[met]
        friends = sp.csr_matrix((np.ones(int(met.sum())), ends), (size[0], size[0]))
        found = by_author.sum(0) + np.expm1(law.show_connected) * (friends @ by_author) + 1e-9
        return np.asarray(found / found.sum(1, keepdims=True))

    @cached_property
    def words(self) -> tuple[Ints, Singles]:
        """Member int64 [T] of each word in a profile and float32 [T, K]: how likely the word is for each topic, up to a factor.

        Members are parted into FOLDS; a word means to one part what the true interests of all other parts say that it means, so
        that what is told never holds anything of the member in question.
        """
        known: dict[str, int] = {}
        said = [
            (row, known.setdefault(word, len(known)))
            for column in self.dataset.members.profile.values()
            for row, text in enumerate(column)
            for word in text.split()
        ]
        member, word = np.array(said, np.int64).reshape(-1, 2).T
        found = np.ones((len(word), self.truth.theta_first.shape[1]))
        for fold in range(FOLDS):
            mine = member % FOLDS == fold
            found[mine] = word_chances(word[~mine], self.truth.theta_first[member[~mine]], len(known))[word[mine]]
        return member, (found / found.mean(1, keepdims=True)).astype(np.float32)


def word_chances(word: Ints, interest: Floats, count: int) -> Floats:
    """Float64 [count, K]: P(word | topic) from words [T] and their users' interests [T, K], by expectation maximisation."""
    usual = DOUBT * interest.mean(0) if len(word) else np.ones(interest.shape[1])
    chance = np.ones((count, interest.shape[1]))
    adder = sp.csr_matrix((np.ones(len(word)), (word, np.arange(len(word)))), (count, len(word)))
    for _ in range(ROUNDS):
        uses = interest * chance[word]
        total = adder @ (uses / uses.sum(1, keepdims=True))
        chance = (total + usual) / (total.sum(0) + usual * count)
    return np.asarray(chance)


def label_table(law: Law, spread: float = HIDDEN_SPREAD) -> Floats:
    """Float64 [2, slots, F, 2, B]: P(label) at the middle of each bin of the fit, averaged over a normal of what is hidden."""
    fit = (np.arange(BINS) + 0.5) / BINS
    points, mass = np.polynomial.hermite_e.hermegauss(9)
    extra = np.array(law.format_extra)[:, :, None, None, None]
    known = np.array([0.0, 1.0])[:, None, None]
    want = law.want_affinity * fit[:, None] + spread * points + law.want_connected * known
    nothing = np.ones((extra.shape[1], 2, BINS, len(points)))
    for base, slope, form, more in zip(law.base, law.slope, extra, law.connected_extra):
        nothing = nothing / (1 + np.exp(base + slope * want + form + more * known))
    looked = (1 - nothing) @ (mass / mass.sum())
    seen = np.array(law.attention)[:, None, None, None] * looked
    return np.stack([1 - seen, seen])
