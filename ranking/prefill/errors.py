"""What can be wrong with a request to score: one type each, so that a service can say which."""

from __future__ import annotations

from index.errors import BrewlineError


class EmptyPrefix(BrewlineError):
    """A request has no prefix tokens."""


class PrefixTooLong(BrewlineError):
    """A prefix leaves no position for its items."""


class EmptyItem(BrewlineError):
    """An item has no tokens."""


class ItemTooLong(BrewlineError):
    """An item has more tokens than the limit and the policy says "error"."""


class UnknownVector(BrewlineError):
    """The id of a vector where there is none, or vectors that are not finite or do not fit the model."""


class UnknownToken(BrewlineError):
    """A token id that the model has no embedding for, or none could have."""


class LabelError(BrewlineError):
    """Label ids that cannot be read: none, repeated, or outside the vocabulary."""


class BadLimits(BrewlineError):
    """Limits that no plan can keep."""


class BadHistory(BrewlineError):
    """Bounds of history entries that do not lie in their prefix, or where no loop computes them apart."""
