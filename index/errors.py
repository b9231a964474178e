"""The one base class of errors that are written for the person who sees them."""

from __future__ import annotations


class BrewlineError(Exception):
    """An error whose message says what was seen, what was expected and what to do.

    The command line prints it as one line and exits with status 2; the service maps each subclass to a gRPC status.
    Anything that is not a `BrewlineError` is a bug and keeps its traceback.
    """
