"""`brewline data export-log` in parts: the stores are opened, the log becomes events, and what was done is told."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import BrewlineError

if TYPE_CHECKING:
    from retrieval.data.exported import Cuts, Exported
    from retrieval.data.refusals import Refusals
    from retrieval.data.schema import Dataset


class ExportError(BrewlineError):
    """A log that cannot be exported as asked."""


@dataclass(frozen=True)
class Made:
    """The folder to write, and what it is made of."""

    log: Exported
    put: int
    withdrawn: int

    @property
    def dataset(self) -> Dataset:
        """The folder's content."""
        return self.log.dataset

    @property
    def refusals(self) -> Refusals:
        """What was left out for a fault."""
        return self.log.refusals


def exported(store: Path, base: Dataset, members: str | None, now: int, until: int, cuts: Cuts | None) -> Made:
    """The base folder continued up to `until` (seconds) with all that a store and its member store (a URL) know at `now`.

    Raises ExportError for a store without a journal, or a member store that is no file (opening it would make an empty one), and
    what its parts raise.
    """
    from index.store import open_store
    from ranking.serving.stack import default_members
    from retrieval.data.exported import export
    from retrieval.data.exported_journal import JOURNAL_DIR, read_journal
    from retrieval.data.refusals import Refusals
    from retrieval.exported_changes import with_changes
    from retrieval.recent import acknowledged

    journal = store / JOURNAL_DIR
    if not journal.is_dir():
        raise ExportError(
            f"{journal} is not there: no server of this store has noted what it showed; check STORE, or that servers run without "
            "--no-journal and may write there"
        )
    address = members or default_members(store)
    if address.startswith("sqlite:") and not Path(address.removeprefix("sqlite:").removeprefix("//")).is_file():
        raise ExportError(f"no member store at {address}; give --members, the one that the servers of this store have")
    refusals = Refusals()
    grown, put, withdrawn = with_changes(store, base, now)
    with closing(open_store(address)) as opened:
        opened.ping()
        told = export(grown, read_journal(journal, refusals), acknowledged(opened, refusals), refusals, until, cuts)
    return Made(told, put, withdrawn)


def read_cuts(valid: str | None, test: str | None, base: Dataset) -> Cuts | None:
    """The cuts in seconds, None if neither is given. Raises ExportError if one is missing."""
    from retrieval.moments import read_as_of

    if valid is None and test is None:
        return None
    if valid is None or test is None:
        raise ExportError("--cut-valid and --cut-test belong together: give both, or none for the quantiles")
    return read_as_of(valid, base, time.time()), read_as_of(test, base, time.time())


def notes_of(made: Made) -> list[str]:
    """What was done, one sentence each."""
    log = made.log
    notes = [
        f"{log.shown:,} impressions and {log.done:,} engagements were added; {log.joined:,} engagements name their impression",
        f"{log.repeated:,} events were told more than once; {log.waiting:,} are too recent and wait for the next export",
        f"{made.put:,} items were put in and {made.withdrawn:,} withdrawn by day",
    ]
    if len(log.refusals):
        notes.append(f"{len(log.refusals):,} records were left out, see `refused`; the first: {log.refusals[0]}")
    return notes
