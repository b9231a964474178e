"""A server's ranker multiplies as it was told, and so does the one that comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np

from ranking.cli.arithmetic import RankerArithmetic
from ranking.prefill.load import Arithmetic
from ranking.ranker import Ranker
from ranking.serving.stack import PROBE, load_stack, open_stack
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly


def test_int8_is_near_float32_and_kept_by_the_next_ranker(
    night: Path, copied: Path, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    link, rows = tmp_path / "ranker", np.arange(20)
    link.symlink_to(night / "ranker1")
    wide, small = (open_stack(copied, night / "encoder1", link, None, arithmetic=how) for how in ("float32", "int8"))
    assert wide.ranker is not None and small.ranker is not None
    assert (wide.ranker.engine.arithmetic, small.ranker.engine.arithmetic) == ("float32", "int8")
    apart = np.abs(small.now().recommender.score(PROBE, rows) - wide.now().recommender.score(PROBE, rows)).max()
    assert 0 < apart < 0.05 and small.ranker.fingerprint == wide.ranker.fingerprint
    nightly(tiny_dataset, Encoder.load(night / "encoder1"), Ranker.load(night / "ranker3"), copied, end_of(tiny_dataset) + 3_600)
    link.unlink()
    link.symlink_to(night / "ranker3")
    after = load_stack(small.origin.source, before=small)
    assert after.ranker is not None and after.ranker is not small.ranker and after.ranker.engine.arithmetic == "int8"


def test_a_server_offers_what_a_cpu_does_well() -> None:
    assert {one.value for one in RankerArithmetic} == {*get_args(Arithmetic)} - {"fp8"}
