"""`brewline nightly`: yesterday's log and today's items become the snapshot that is served."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ranking.cli.forms import CodesChoice, HybridWeights, hybrid_settings
from ranking.cli.member_store import MembersUrl
from ranking.cli.night_metrics import check_metrics, write_metrics
from ranking.cli.output import Report, emit, progress_bar, words

if TYPE_CHECKING:
    from retrieval.data.schema import Dataset
    from retrieval.encoder import Encoder
    from retrieval.hybrid import HybridSettings
    from retrieval.refresh import NightReport, Progress, SnapshotForm
    from retrieval.units import UnitReader

DEFAULT_HYSTERESIS = 0
"""A snapshot that follows from data, encoder and time alone, and equals a rebuild, is worth more than half the embedding: who
needs that half asks for 1, for which a loss of half a point of recall was ruled out (`brewline bench night`)."""
RankerFolder = Annotated[Path | None, typer.Option(help="The ranker folder; without it only retrieval is served.", metavar="DIR")]
Buckets = Annotated[
    int, typer.Option(help="Buckets that a number may stray before its item is encoded again; 0: every change counts.", min=0)
]
MetricsFile = Annotated[
    Path | None, typer.Option(help="Also write what was done in Prometheus' text format, if all went well.", metavar="FILE")
]
Dims = Annotated[
    int | None, typer.Option(help="Keep the leading numbers of every vector only. Default: all.", min=1, show_default=False)
]
Keep = Annotated[int, typer.Option(help="Snapshots to keep, the newest; the served one and the one before stay anyway.", min=0)]
AsOf = Annotated[str, typer.Option(help="now, end (of the data), seconds, or an ISO time: what is known then.", metavar="TIME")]
RecipeFile = Annotated[
    Path | None, typer.Option(help="The index to build, from `brewline index tune --out`. Default: by size.", metavar="FILE")
]
WithHybrid = Annotated[
    bool, typer.Option("--hybrid", help="Also write a lexical index and a popularity list, for `serve --hybrid`.")
]
Shards = Annotated[
    int,
    typer.Option(
        help="Divide the items into so many parts, each with its own index; `serve` merges their answers.", min=1, max=1_000
    ),
]
LeastOverlap = Annotated[
    float,
    typer.Option(help="Of yesterday's best 2,000 this share must be found again, or nothing is published; 0: any.", min=0, max=1),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Encode what changed on the machines of a Ray cluster (extra `cluster`), to the same vectors. local: a Ray on this "
        "machine for this night; auto: the cluster that this machine is part of; or HOST:PORT. Default: without Ray.",
        metavar="ADDRESS",
        show_default=False,
    ),
]
RayWorkers = Annotated[
    int | None,
    typer.Option(
        help="With --ray: processes that encode, each with the model in its memory, on as many threads as this one would. "
        "Default, and never more: as many as the cluster has room for.",
        min=1,
        show_default=False,
    ),
]


def nightly(
    data: Annotated[Path, typer.Argument(help="A data folder (see `brewline data check`).", metavar="DATA")],
    encoder: Annotated[Path, typer.Option(help="The encoder folder.", metavar="DIR")],
    store: Annotated[Path, typer.Option(help="Where snapshots are kept; made if missing.", metavar="DIR")],
    ranker: RankerFolder = None,
    members: MembersUrl = None,
    hybrid: WithHybrid = False,
    hybrid_weights: HybridWeights = None,
    dims: Dims = None,
    codes: Annotated[CodesChoice, typer.Option(help="What the items' vectors are kept in.")] = CodesChoice.float32,
    hysteresis: Buckets = DEFAULT_HYSTERESIS,
    metrics: MetricsFile = None,
    recipe: RecipeFile = None,
    shards: Shards = 1,
    least_overlap: LeastOverlap = 0,
    keep: Keep = 7,
    as_of: AsOf = "now",
    ray: RayAddress = None,
    ray_workers: RayWorkers = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Encode what changed, build and check the index, load the members, and publish. No snapshot is served before the end.

    What servers were told since the data folder's last event (`brewline ask upsert|withdraw`) wins over the folder.

    Counts, histories and items are those known at --as-of; a historical data set is served as of its end.

        brewline nightly data/ --encoder encoder/ --ranker ranker/ --store store/
        brewline nightly movietweets/ --encoder encoder/ --store store/ --as-of end
        brewline nightly data/ --encoder encoder/ --store store/ --members redis://localhost/0 --as-of 2026-01-31
        brewline nightly data/ --encoder encoder/ --store store/ --hybrid --dims 64 --codes int8
        brewline nightly data/ --encoder encoder/ --store store/ --recipe recipe.json --least-overlap 0.5
        brewline nightly data/ --encoder encoder/ --store store/ --shards 8
        brewline nightly data/ --encoder encoder/ --store store/ --ray auto --ray-workers 16
    """
    from index.store import open_store
    from ranking.serving.stack import default_members, load_models
    from retrieval.members import MemberStore
    from retrieval.memory import freeze_loaded
    from retrieval.refresh import nightly as run

    form = _form(codes, hybrid_settings(hybrid, hybrid_weights), hysteresis, recipe, shards)
    if metrics is not None:
        check_metrics(metrics)
    _check_cluster(ray, ray_workers)
    dataset, moment = _known(data, as_of)
    reader, judge = load_models(encoder, ranker)
    if dims is not None and dims != reader.dims:
        reader = reader.truncated(dims)
    far = _far(ray, reader, encoder, ray_workers)
    _make(store)
    freeze_loaded()
    with closing(open_store(members or default_members(store))) as opened, stage_bars() as told:
        opened.ping()  # a Redis store connects at first use, which would otherwise come after hours of encoding
        kept = MemberStore(opened, reader.fingerprint)
        report = run(dataset, reader, judge, store, moment, kept, told, form, keep=keep, least_overlap=least_overlap, reader=far)
    if metrics is not None:
        write_metrics(metrics, report, time.time())
    emit(vars(report), as_json=as_json, table=lambda: _table(report))


def _form(codes: CodesChoice, hybrid: HybridSettings | None, buckets: int, recipe: Path | None, shards: int) -> SnapshotForm:
    from index.tune import read_choice
    from retrieval.hysteresis import Hysteresis
    from retrieval.refresh import BY_SIZE, SnapshotForm

    return SnapshotForm(codes.value, hybrid, Hysteresis(buckets), BY_SIZE if recipe is None else read_choice(recipe), shards)


def _known(data: Path, as_of: str) -> tuple[Dataset, int]:
    """The data folder, and the time that a person wrote in seconds. Raises NightError and what reading raises."""
    from retrieval.data.read import read_dataset
    from retrieval.moments import read_as_of, warn_if_quiet

    dataset = read_dataset(data)
    moment = read_as_of(as_of, dataset, time.time())
    warn_if_quiet(as_of, moment, dataset)
    return dataset, moment


def _check_cluster(address: str | None, workers: int | None) -> None:
    """Raises, before anything is read, BadParameter for workers of no cluster, and ClusterError for one that is not there."""
    if address is None:
        if workers is not None:
            raise typer.BadParameter("they are workers of a Ray cluster: say --ray too", param_hint="--ray-workers")
        return
    from retrieval.cluster import check_cluster

    check_cluster(address)


def _far(address: str | None, encoder: Encoder, folder: Path, workers: int | None) -> UnitReader | None:
    """What reads units on the cluster, None without an address. No Ray is asked for yet."""
    if address is None:
        return None
    from retrieval.cluster import ClusterReader

    return ClusterReader(address, encoder, folder, workers=workers)


def _make(store: Path) -> None:
    from retrieval.moments import NightError

    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NightError(f"--store {store} cannot be made: {error.strerror}; name a folder of your own") from error


@contextmanager
def stage_bars() -> Iterator[Progress]:
    """Yields what shows one bar for each stage, the one before finished when the next begins."""
    with ExitStack() as open_bar:
        now: dict[str, Report] = {}

        def told(stage: str, done: int, total: int) -> None:
            if stage not in now:
                open_bar.close()
                now.clear()
                now[stage] = open_bar.enter_context(progress_bar(stage))
            now[stage](done, total)

        yield told


def _table(report: NightReport) -> Table:
    from retrieval.moments import moment_words

    table = Table("night", "", title=f"Snapshot {report.snapshot}", title_justify="left", show_header=False)
    table.add_row("served", "now" if report.published else "already was: the same night makes the same snapshot")
    table.add_row("as of", moment_words(report.as_of))
    compared = "the count of items had nothing to be compared with"
    if report.items_before is not None:
        compared = f"{report.items_before:,} items, tonight's count was compared with that"
    table.add_row("before", words(f"{report.predecessor or 'nothing was published'}; {compared}"))
    table.add_row(
        "items",
        f"{report.items:,}, of which {report.embedded:,} were encoded in {report.seconds_embed:.1f} s, by {report.embedded_by}",
    )
    stray = f"up to {report.hysteresis} buckets from the encoded one change nothing"
    table.add_row("numbers", stray if report.hysteresis else "every change of a bucket counts")
    if report.live_position:
        told = f"{report.put:,} items put in and {report.withdrawn:,} withdrawn won over the folder"
        table.add_row("by day", f"{told}, up to change {report.live_position}")
    table.add_row("removed", f"{report.removed:,} old snapshots")
    table.add_row(
        "members", f"{report.members:,}, of which {report.members_encoded:,} were encoded in {report.seconds_members:.1f} s"
    )
    recall = "not measured" if report.recall is None else f"recall@{report.recall_k} {report.recall:.4f} against exact search"
    table.add_row("index", f"{report.index}, {recall}")
    if report.shards > 1 or report.shards_before > 1:
        table.add_row("shards", _shards(report))
    if report.overlap is not None:
        table.add_row("overlap", f"{report.overlap:.4f} of the best {report.overlap_k:,} of the night before")
    table.add_row("vectors", f"{report.dims:,} x {report.codes}{', with a lexical index and a popularity list' * report.hybrid}")
    table.add_row("encoder", report.encoder)
    table.add_row("ranker", report.ranker or "none: only retrieval can be served")
    table.add_row("took", f"{report.seconds:.1f} s")
    return table


def _shards(report: NightReport) -> str:
    told = f"{report.shards} by the hash of the id, an index of that kind in each" if report.shards > 1 else "none"
    if report.shards_before in (0, report.shards):
        return told
    before = f"{report.shards_before} shards" if report.shards_before > 1 else "not divided"
    return f"{told}; {before} the night before: items changed places, no vector changed for it"
