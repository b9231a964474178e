"""The words of the synthetic world: two vocabularies that share no topic word, and texts drawn from them.

A topic is spoken of in several registers with different words, and each word belongs to two or three topics: the same subject
often has no word in common, the same word often means another subject. Matching strings therefore says little; what a
word means must be learned from who engaged with what.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")


def draw(cumulative: F64, row: npt.NDArray[np.integer], u: F64) -> I64:
    """Int64 [n]: for each row number a column, drawn by `u` in [0, 1) from that row of a [R, C] table of running sums.

    A row without any weight gives its last column.
    """
    total = cumulative[:, -1:]
    scaled = cumulative / np.where(total > 0, total, 1.0)
    found = np.searchsorted((scaled + np.arange(len(scaled))[:, None]).ravel(), u + row, "right")
    return np.minimum(found - row * cumulative.shape[1], cumulative.shape[1] - 1).astype(np.int64)


def make_words(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different made-up words of two or three syllables, in random order."""
    two = [a + v + b + w for a in _ONSETS for v in _VOWELS for b in _ONSETS[:15] for w in _VOWELS]
    order = np.argsort(rng.random(len(two)), kind="stable")
    return [two[i] for i in order[:count]]


@dataclass(frozen=True)
class Speech:
    """One side's topic words: `cumulative` float64 [topics * registers, words], running sums of each group's weights."""

    words: list[str]
    registers: int
    cumulative: F64

    def say(self, rng: np.random.Generator, topic: I64, register: I64) -> I64:
        """Int64, shape of `topic`: one word number for each (topic, register)."""
        group = (topic * self.registers + register).ravel()
        return draw(self.cumulative, group, rng.random(len(group))).reshape(topic.shape)


def make_speech(rng: np.random.Generator, words: list[str], topics: int, registers: int, meanings: tuple[float, ...]) -> Speech:
    """Deal each word to two or three (topic, register) groups of different topics, the first of them evenly.

    `meanings`: weights of a word's first, second and third topic; every other round of words has no third.
    """
    groups, count = topics * registers, len(words)
    weight = np.zeros((groups, count))
    deal = np.argsort(rng.random(count), kind="stable")
    first = np.arange(count) % groups
    for place, strength in enumerate(meanings):
        far = rng.integers(1, topics, count) if place else np.zeros(count, np.int64)
        register = rng.integers(0, registers, count) if place else first % registers
        group = (first // registers + far) % topics * registers + register
        said = np.ones(count, np.bool_) if place < 2 else np.arange(count) // groups % 2 == 0
        weight[group[said], deal[said]] = np.maximum(weight[group[said], deal[said]], strength)
    return Speech(words, registers, np.cumsum(weight, axis=1))


def sentences(rng: np.random.Generator, parts: list[tuple[I64, list[str]]]) -> list[str]:
    """One string per row: the row's words from all parts (numbers int64 [n, w], words), in random order."""
    table = np.concatenate([np.array(words, dtype=str)[numbers] for numbers, words in parts], axis=1)
    order = np.argsort(rng.random(table.shape), axis=1, kind="stable")
    return [" ".join(row) for row in np.take_along_axis(table, order, axis=1).tolist()]
