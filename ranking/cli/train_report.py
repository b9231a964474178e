"""How trainings look on a terminal: one bar per stage, then a table of what was reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from rich.table import Table

from ranking.cli.output import Report, progress_bar, words

DEFAULT_MINUTES = 5.0

StageReport = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


def how_long(steps: int | None, minutes: float | None) -> float | None:
    """The minutes to train, None where steps are given. Raises TrainingError if both are."""
    from retrieval.learn.checkpoint import TrainingError

    if steps is not None and minutes is not None:
        raise TrainingError("--minutes and --steps both say how long; give one of them")
    return None if steps is not None else (DEFAULT_MINUTES if minutes is None else minutes)


@contextmanager
def stages() -> Iterator[StageReport]:
    """Yields a callback that draws one progress bar per stage name, in the order in which stages first report."""
    with ExitStack() as stack:
        bars: dict[str, Report] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = stack.enter_context(progress_bar(stage))
            bars[stage](done, total)

        yield report


def training_table(what: str, report: Mapping[str, object]) -> Table:
    """A training report as a table: one row per fact, the note last."""
    return facts_table({"model": what, **{name: value for name, value in report.items() if value not in ("", {})}})


def facts_table(facts: Mapping[str, object]) -> Table:
    """Names beside values."""
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        shown = ", ".join(f"{key}: {held}" for key, held in value.items()) if isinstance(value, Mapping) else str(value)
        table.add_row(name.replace("_", " "), words(shown))
    return table


def places(curve: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """What positions added to logits in training and add no longer: surface -> a number for each range of positions."""
    found: dict[str, list[str]] = {}
    for row in curve:
        span = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        found.setdefault(str(row["surface"]), []).append(f"{span} {row['logit']:+.2f}")
    return {name: ", ".join(rows) for name, rows in found.items()}
