"""The check report as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ranking.cli.output import words
from retrieval.data.check import CheckReport

MOST_REASONS = 20


def report_table(report: CheckReport, notes: Sequence[str] = ()) -> RenderableType:
    """The report as text blocks. Names and values come from strangers' files, so none of them is read as markup."""
    table = Table(title=words(report.name), show_header=False, box=None, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, said in _lines(report):
        table.add_row(words(name), words(said))
    blocks: list[RenderableType] = [table, *_refused(report)]
    blocks += [_marked("note", "cyan", note) for note in notes]
    blocks += [_marked("warning", "yellow", f"{warning.says} [{warning.kind}]") for warning in report.warnings]
    if not report.warnings and not report.refused:
        blocks.append(Text("no row refused, no sign of a leak", style="green"))
    return Group(*blocks)


def _marked(mark: str, style: str, said: str) -> Text:
    return Text.assemble((f"{mark} ", style), words(said))


def _lines(report: CheckReport) -> list[tuple[str, str]]:
    lines = [("sizes", _counts(report.sizes))]
    if report.span is None or report.cuts is None:
        lines.append(("log", "none: models learn from the items' text alone"))
    else:
        order = "" if report.order == "timestamp" else " (pseudo-times: the source has none)"
        lines += [
            ("log", f"{report.span[0]} to {report.span[1]}{order}"),
            ("cuts", f"valid from {report.cuts[0]}, test from {report.cuts[1]}"),
            ("splits", _counts(report.splits)),
            ("actions", _counts(report.actions)),
            ("labels", _counts(report.labels)),
            ("distinct items", "; ".join(f"{length}: {count:,} members" for length, count in report.history_lengths.items())),
            ("cold items", f"{report.cold_items or 0:.1%} have no engagement before the test window"),
        ]
    lines.append(("words", _shares(report.texts)))
    if report.numbers:
        lines.append(("numbers", _shares(report.numbers)))
    return lines + [(f"not read: {file}", ", ".join(names)) for file, names in report.ignored_columns.items()]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _refused(report: CheckReport) -> list[Text]:
    if not report.refused:
        return []
    said = [Text(f"{report.refused_rows:,} rows refused", style="red")]
    reasons = list(report.refused.items())
    said += [words(f"  {count:>9,}  {reason}") for reason, count in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        said.append(Text(f"  and {len(reasons) - MOST_REASONS:,} more reasons"))
    said += [words(f"  {line}") for line in report.first_refusals]
    hidden = report.refused_rows - len(report.first_refusals)
    return [*said, Text(f"  and {hidden:,} more rows")] if hidden else said
