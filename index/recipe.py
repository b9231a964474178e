"""What kind of index a night builds, as the text that manifests and recipe files hold."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

from index.codes import Codes
from index.errors import BrewlineError

FLAT_ROWS = 100_000
FLAT_NUMBERS = FLAT_ROWS * 128
"""Up to this many rows, or this many numbers, one scan takes milliseconds and stays exact: 1.9 for 100,000 x 128 (one query,
k = 2,000, the certified scan of `index.serving`)."""
SHORT = "ShortList"
GROUPS = 2
"""The lists of a short list are of so many groups, each for a thread: see `index.shortlist`."""
SHORT_ROWS = 20_000
"""With fewer, everything is scored before a short list is found: it is not worth measuring."""
FEWEST_ROWS = 1_024
"""Of a short list: 16 codes are to be found for every pair of numbers."""


class BuildError(BrewlineError):
    """An index cannot be built from these vectors or this recipe."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The kind of index: "Flat" scans everything (lists 0), "IVF256,Flat" visits some of 256 inverted lists.

    With `half` it holds the numbers as float16 ("SQfp16"), half the memory: for vectors that are kept so, the same scores. With
    `short` it holds 2 bits a number and finds a short list by them, which true scores put in order ("ShortList").
    """

    lists: int = 0
    half: bool = False
    short: bool = False

    def __str__(self) -> str:
        kept = SHORT if self.short else "SQfp16" if self.half else "Flat"
        return f"IVF{self.lists},{kept}" if self.lists else kept

    @classmethod
    def parse(cls, text: str) -> Self:
        """The recipe that `str` wrote is returned. Raises BuildError for any other text."""
        match = re.fullmatch(rf"(?:IVF([1-9][0-9]{{0,6}}),)?(Flat|SQfp16)|IVF([1-9][0-9]{{0,6}}),{SHORT}", text, re.ASCII)
        if match is None:
            raise BuildError(
                f"recipe {text!r} is unknown: expected Flat, SQfp16, or IVF<lists> before one of them or ShortList (IVF256,Flat)"
            )
        return cls(int(match[1] or match[3] or 0), match[2] == "SQfp16", bool(match[3]))

    @property
    def least_rows(self) -> int:
        """Fewer vectors cannot be indexed so."""
        return max(self.lists, FEWEST_ROWS) if self.short else self.lists

    def width(self, dims: int) -> int:
        """How many numbers the FAISS index takes for a vector of `dims`: a short list marks its lists with one more, in pairs."""
        return dims + 1 + (dims + 1) % 2 if self.short else dims


def choose_recipe(count: int, dims: int, codes: Codes = "float32") -> Recipe:
    """A recipe for `count` vectors of `dims` numbers is returned: Flat while a scan is cheap, then lists.

    A short list where vectors are kept as float32, which its true scores are made from in place.
    """
    half = codes == "float16"
    if count < FLAT_ROWS or count * dims < FLAT_NUMBERS:
        return Recipe(half=half)
    if codes == "float32":
        return Recipe(choose_short_lists(count), short=True)
    return Recipe(choose_lists(count), half)


def choose_lists(count: int) -> int:
    """A number of lists for `count` vectors whose numbers are all read is returned: about 2 sqrt(N)."""
    return int(2 ** round(math.log2(2 * math.sqrt(count))))


def choose_short_lists(count: int) -> int:
    """A number of lists for `count` vectors is returned: about 4 sqrt(N), at least 39 vectors each."""
    return max(GROUPS, min(int(2 ** round(math.log2(4 * max(count, 1) ** 0.5))), count // 39) // GROUPS * GROUPS)
