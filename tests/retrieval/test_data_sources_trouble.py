"""Importers when the source is not what it should be, and the dates that they read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from retrieval.data.schema import DataError
from retrieval.data.sources.dates import american_time, any_time, iso_time, written_day
from retrieval.data.sources.importers import IMPORTERS, importer


@pytest.mark.parametrize("kind", sorted(IMPORTERS))
def test_a_folder_without_the_originals_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"expected|unpack"):
        importer(kind)(tmp_path, None)


def test_a_truncated_download_and_an_unknown_kind_are_one_clear_line(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"asin": "B1", "title": "x"}\n' * 50)
    (tmp_path / "meta_A.json.gz").write_bytes(whole[:-12])
    (tmp_path / "A.json").write_text("{}\n")
    with pytest.raises(DataError, match="download it again"):
        importer("amazon")(tmp_path, None)
    with pytest.raises(DataError, match="no importer is named 'netflix'"):
        importer("netflix")


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    (tmp_path / "movies.dat").write_text("1::A (2000)::\n")
    (tmp_path / "ratings.dat").write_text("1::1::9::1400000000\n")
    importer("movietweets")(tmp_path, lambda done, total: said.append((done, total)))
    assert said and said[-1][0] == said[-1][1]


def test_times_are_read_without_guessing() -> None:
    assert written_day("Nov 5, 2011") == written_day("November 5, 2011") == 1_320_451_200
    assert written_day("November 5") is written_day("Nevember 5, 2011") is written_day("February 30, 2011") is None
    assert american_time("11/15/2019 12:30:00 PM") == iso_time("2019-11-15T12:30:00Z")
    assert american_time("11/15/2019 12:30:00 AM") == iso_time("2019-11-15 00:30:00")
    assert american_time("15/11/2019 12:30:00 AM") is None
    assert any_time("1400000000000") == any_time("1400000000") == any_time("1400000000.0") == 1_400_000_000
    assert any_time("2014-05-13T18:53:20+02:00") == 1_400_000_000
    assert any_time("13.05.2014") is any_time("") is any_time("١٢٣٤") is None
