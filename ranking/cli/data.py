"""`brewline data`: look at a data folder, make one from public data or from a CSV file, or invent a whole world."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.member_store import MEMBERS_VARIABLE

if TYPE_CHECKING:
    from retrieval.data.sources.assemble import Imported

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Data folders: check one, import one, or invent a world.",
    epilog="Start with `brewline data world WORLD`, then `brewline data check WORLD`.",
)
importers = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Make a data folder from original files.")
app.add_typer(importers, name="import")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Source = Annotated[Path, typer.Argument(help="The folder with the original files, unpacked.", show_default=False)]
Out = Annotated[
    Path, typer.Argument(help="The data folder to write; an older data folder there is replaced.", show_default=False)
]


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="The data folder.", show_default=False)], as_json: AsJson = False) -> None:
    """Sum up a data folder: sizes, splits, refused rows with their reasons, and signs of leaks.

    Rows that do not fit are counted and shown (the status stays 0); a folder that cannot be read at all is an error.

    Example: `brewline data check my-data --json | jq .warnings`
    """
    from ranking.cli.data_report import report_table
    from ranking.cli.output import emit
    from retrieval.data.check import check_folder

    report = check_folder(folder)
    emit(report.as_json(), as_json=as_json, table=lambda: report_table(report))


@app.command()
def world(
    out: Out,
    members: Annotated[int | None, typer.Option(help="Members of the whole period.", show_default="the world's own")] = None,
    items: Annotated[int | None, typer.Option(help="Posts of the whole period.", show_default="the world's own")] = None,
    days: Annotated[int | None, typer.Option(help="Days of the log.", show_default="the world's own")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same world, byte for byte.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Invent a feed with known truth: members, posts, connections, impressions with position bias, several actions.

    The true probability of every action is written beside the data, so an oracle's recall and AUC are the ceiling.

    Example: `brewline data world WORLD --members 500 --items 800 --days 14 --seed 1`
    """
    from ranking.cli.output import progress_bar
    from retrieval.data.world import WorldSettings, make_world, write_world

    plain = WorldSettings()
    settings = WorldSettings(
        plain.members if members is None else members,
        plain.items if items is None else items,
        plain.days if days is None else days,
        seed,
    )
    with progress_bar("days lived") as progress:
        made = make_world(settings, progress)
    write_world(made, out)
    _finish(out, as_json, [])


@importers.command("csv")
def import_csv(
    out: Out,
    items: Annotated[Path, typer.Option(help="CSV file of items: the only file that is needed.", show_default=False)],
    events: Annotated[Path | None, typer.Option(help="CSV file of events: who did what with which item, when.")] = None,
    members: Annotated[Path | None, typer.Option(help="CSV file of members; its columns become the profile.")] = None,
    maps: Annotated[list[str] | None, typer.Option("--map", help="NAME=COLUMN, as often as needed.")] = None,
    action: Annotated[list[str] | None, typer.Option(help="An action that counts as an engagement. [all but impression]")] = None,
    label: Annotated[str, typer.Option(help="What label 1 means, in words.")] = "",
    name: Annotated[str | None, typer.Option(help="Name of the data set.", show_default="the folder's name")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a data folder from tables: a listing site needs no more than one CSV file of items.

    Encoding (UTF-8, UTF-16, Windows-1252) and delimiter (comma, semicolon, tab, bar) are found out. Columns that are named
    as in the schema need no --map; several columns with one NAME are joined; any other NAME of the items is a number.
    Times are seconds, milliseconds or like 2024-01-31 10:00:00 (UTC). NAME can be `items.`, `events.` or `members.` NAME.

    Items only: `brewline data import csv --items shop.csv --map title=name --map text=description --map price=eur SHOP`

    With events: `brewline data import csv --items i.csv --events e.csv --map events.item_id=sku --map timestamp=when SHOP`
    """
    from ranking.cli.output import progress_bar
    from retrieval.data.sources.listing import Listing, import_listing

    listing = Listing(items, events, members, maps or [], action or [], name or out.name, label)
    with progress_bar("bytes read") as progress:
        imported = import_listing(listing, progress)
    _write(imported, out, as_json)


@app.command("export-log")
def export_log(
    store: Annotated[Path, typer.Argument(help="The snapshot store whose servers wrote the journal.", show_default=False)],
    out: Out,
    data: Annotated[Path, typer.Option(help="The data folder to continue: that of the last night.", metavar="DIR")],
    members: Annotated[
        str | None,
        typer.Option(
            help="The servers' member store. [default: the one in STORE]",
            metavar="URL",
            envvar=MEMBERS_VARIABLE,
            show_default=False,
        ),
    ] = None,
    settle_minutes: Annotated[
        float, typer.Option(help="What was shown so recently may still be answered, and waits for the next export.", min=0)
    ] = 60.0,
    cut_valid: Annotated[str | None, typer.Option(help="Validation begins: seconds or an ISO time.", metavar="TIME")] = None,
    cut_test: Annotated[
        str | None, typer.Option(help="The test window begins. [both: day of the 0.8 and 0.9 quantile]", metavar="TIME")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make tomorrow's training folder: the last one, what servers showed, what members did, items put in and withdrawn by day.

    Impressions come from STORE/journal, engagements also from the member store. Exporting again makes the same folder. Lines
    that cannot be read are counted and shown.

    Example: `brewline data export-log STORE TOMORROW --data TODAY`
    """
    from ranking.cli.export_log import exported, notes_of, read_cuts
    from retrieval.data.read import read_dataset
    from retrieval.data.write import write_dataset

    base, now = read_dataset(data), int(time.time())
    cuts = read_cuts(cut_valid, cut_test, base)
    made = exported(store, base, members, now, now - round(60 * settle_minutes), cuts)
    write_dataset(made.dataset, out)
    _finish(out, as_json, notes_of(made), made.refusals.counts())


def _add_importer(kind: str, expects: str) -> None:
    """One command for each public data set; all take SRC and OUT."""

    def command(source: Source, out: Out, as_json: AsJson = False) -> None:
        from ranking.cli.output import progress_bar
        from retrieval.data.sources.importers import importer

        with progress_bar("bytes read") as progress:
            imported = importer(kind)(source, progress)
        _write(imported, out, as_json)

    words = f"SOURCE holds {expects}.\n\nExample: `brewline data import {kind} downloads/{kind} data/{kind}`"
    importers.command(kind, help=words)(command)


KINDS = {
    "movietweets": "movies.dat and ratings.dat of MovieTweetings",
    "movielens": "movies.csv and ratings.csv (tags.csv), or movies.dat and ratings.dat (users.dat) of MovieLens",
    "goodbooks": "books.csv and ratings.csv (book_tags.csv, tags.csv) of goodbooks-10k",
    "mind": "news.tsv and behaviors.tsv of MIND, or folders (train, dev) that hold them",
    "amazon": "one reviews file and one meta_ file of Amazon reviews 2018 or 2023 (.json, .jsonl, also .gz)",
    "steam": "australian_user_reviews.json and steam_games.json of the UCSD Steam data (also .gz)",
}
for _kind, _expects in KINDS.items():
    _add_importer(_kind, _expects)


def _write(imported: Imported, out: Path, as_json: bool) -> None:
    from retrieval.data.write import write_dataset

    write_dataset(imported.dataset, out)
    refused = imported.refusals
    for line in [f"refused: {reason} ({count:,})" for reason, count in refused.counts().items()][:20]:
        typer.echo(line, err=True)
    for refusal in refused[:5]:
        typer.echo(f"  {refusal}", err=True)
    _finish(out, as_json, imported.notes, refused.counts())


def _finish(out: Path, as_json: bool, notes: list[str], refused: dict[str, int] | None = None) -> None:
    """The folder is read back: what is reported is what the next command will find."""
    from ranking.cli.data_report import report_table
    from ranking.cli.output import emit
    from retrieval.data.check import check_folder

    report = check_folder(out)
    facts = {"folder": str(out), "notes": notes, "source_rows_refused": refused or {}, "check": report.as_json()}
    emit(facts, as_json=as_json, table=lambda: report_table(report, notes))
    typer.echo(f"written: {out}", err=True)
