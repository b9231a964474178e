"""MIND: news impressions with clicks. `news.tsv` and `behaviors.tsv`, in the folder itself or in its subfolders (train, dev).

News: id, category, subcategory, title, abstract, url, two entity lists. Behaviours: impression id, user, time
(`11/13/2019 8:36:57 AM`), clicked history, impressions `N1-0 N2-1`. Two decisions, both in docs/data.md:
the publisher shuffled the order inside an impression, so no `position` is made of it; and the history has an order but no
times, so its clicks are spread evenly over the four weeks before the log begins (action "click:history").
"""

from __future__ import annotations

from pathlib import Path

from retrieval.data.refusals import Refusals
from retrieval.data.schema import DAY, IMPRESSION, DataError, Members, Meta
from retrieval.data.sources.assemble import Imported, ItemsBuilder, LogBuilder, assemble
from retrieval.data.sources.dates import american_time
from retrieval.data.sources.lines import Progress, clean, clean_list, split_lines

HISTORY_DAYS = 28
SURFACE = "news feed"
NOTE = "clicks of the histories have no times in the source: they are spread over the four weeks before the log"


def import_mind(source: Path, progress: Progress | None = None) -> Imported:
    """The data set of one or several MIND folders; an impression has label 1 if it was clicked."""
    refusals = Refusals()
    folders = _folders(source)
    builder = ItemsBuilder("news.tsv", refusals)
    log = LogBuilder("behaviors.tsv")
    histories: dict[str, tuple[int, int, str]] = {}
    for folder in folders:
        _read_news(folder / "news.tsv", builder, refusals)
    for done, folder in enumerate(folders):
        prefix = f"{folder.name}-" if len(folders) > 1 else ""
        _read_behaviours(folder / "behaviors.tsv", prefix, builder, log, histories, refusals)
        if progress is not None:
            progress(done + 1, len(folders))
    _add_histories(log, histories, builder, refusals)
    meta = Meta(
        "mind", 0, 0, ("click",), "1 if the shown article was clicked, else 0",
        extra={"source": "MIND, Microsoft News", "time_granularity": "second"},
    )  # fmt: skip
    imported = assemble(meta, builder.items(), Members([]), log.log(), refusals)
    return Imported(imported.dataset, refusals, [*imported.notes, NOTE])


def _folders(source: Path) -> list[Path]:
    candidates = [source, *sorted(path for path in source.glob("*") if path.is_dir())]
    found = [path for path in candidates if (path / "news.tsv").is_file() and (path / "behaviors.tsv").is_file()]
    if not found:
        raise DataError(f"{source}: news.tsv and behaviors.tsv are neither there nor in its folders; unpack MIND there")
    return found


def _read_news(path: Path, builder: ItemsBuilder, refusals: Refusals) -> None:
    for row, parts in split_lines(path, "\t", 5, refusals, at_least=True):
        number, category, subcategory, title, abstract = parts[:5]
        if number in builder.row_of:
            continue  # the same article stands in the train and in the dev folder
        builder.add(row, number, clean(title), clean(abstract), ", ".join(clean_list([category, subcategory])))


def _read_behaviours(
    path: Path,
    prefix: str,
    builder: ItemsBuilder,
    log: LogBuilder,
    histories: dict[str, tuple[int, int, str]],
    refusals: Refusals,
) -> None:
    for row, (number, member, written, history, shown) in split_lines(path, "\t", 5, refusals):
        time = american_time(written)
        if time is None or not member:
            refusals.one(path.name, row, "no member, or a time not like 11/13/2019 8:36:57 AM", written)
            continue
        if member not in histories or time < histories[member][0]:
            histories[member] = (time, row, history)
        clicked = []
        for entry in shown.split():
            item, _, sign = entry.rpartition("-") if entry[-2:] in ("-0", "-1") else (entry, "", "")
            if item not in builder.row_of:
                refusals.one(path.name, row, "impression of an unknown article", entry)
                continue
            label = int(sign) if sign else -1
            log.add(row, member, item, time, IMPRESSION, label, request=f"{prefix}{number}", surface=SURFACE)
            if label == 1:
                clicked.append(item)
        for item in clicked:
            log.add(row, member, item, time, "click", request=f"{prefix}{number}", surface=SURFACE)


def _add_histories(
    log: LogBuilder, histories: dict[str, tuple[int, int, str]], builder: ItemsBuilder, refusals: Refusals
) -> None:
    """Each member's earliest known history becomes clicks before the first day of the log, oldest first."""
    if not histories:
        raise DataError(
            f"behaviors.tsv: no valid line in it: {refusals.mostly('behaviors.tsv')}; check that it is the original file"
        )
    start = min(time for time, _, _ in histories.values()) // DAY * DAY - HISTORY_DAYS * DAY
    for member, (_, row, history) in histories.items():
        items = history.split()
        for place, item in enumerate(items):
            if item not in builder.row_of:
                refusals.one("behaviors.tsv", row, "history names an unknown article", item)
                continue
            time = start + int((place + 0.5) / len(items) * HISTORY_DAYS * DAY)
            log.add(row, member, item, time, "click:history")
