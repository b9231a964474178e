"""Many members at once are answered as each alone, and an explanation tells what Recommend did, of items it returned and not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from index.fusion import fuse
from index.store import open_store
from ranking.cli import ask
from ranking.ranker import Ranker
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.batch import MAX_BATCH
from ranking.serving.client import Answer, Client, ServiceError
from ranking.serving.messages import member_message, unpack_ids
from ranking.serving.stack import Stack, open_stack
from ranking.serving.wide import Wide
from retrieval.attributes import EVERYTHING, Wanted
from retrieval.data.schema import Connection, Dataset, Engagement, Item, Member, MemberView
from retrieval.encoder import Encoder
from retrieval.hybrid import HybridSettings
from retrieval.members import MemberStore
from retrieval.moments import end_of
from retrieval.refresh import SnapshotForm, nightly

Start = Callable[..., tuple[int, Callable[[], None]]]
NEW = Item("new", "roses and compost", "a short piece about pruning", "gardens", "author 9", 1_705_000_000, {"price": 4.0})
KINDS = ("dense", "hybrid")


@pytest.fixture(scope="module")
def stacks(night: Path, tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Iterator[dict[str, Stack]]:
    """Both first stages and a ranker over one store of its own: an item of today, two withdrawn, one of the night replaced."""
    store, encoder = tmp_path_factory.mktemp("explained"), Encoder.load(night / "encoder1")
    members = MemberStore(open_store(f"sqlite:{store / 'members.sqlite'}"), encoder.fingerprint)
    ranker, form = Ranker.load(night / "ranker1"), SnapshotForm(hybrid=HybridSettings())
    nightly(tiny_dataset, encoder, ranker, store, end_of(tiny_dataset), members, form=form)
    made = {k: open_stack(store, night / "encoder1", night / "ranker1", None, hybrid=k == "hybrid") for k in KINDS}
    made["dense"].today.upsert([NEW, replace(NEW, item_id="gone"), replace(NEW, item_id="i2")], 5)
    made["dense"].today.withdraw(["gone", "i4"])
    time.sleep(0.3)
    yield made
    for stack in made.values():
        stack.today.close()


@pytest.fixture(params=KINDS)
def asked(request: pytest.FixtureRequest, stacks: dict[str, Stack], start: Start) -> Iterator[Client]:
    """A client of a server over one of the first stages."""
    port, _ = start(stacks[request.param])
    with Client(f"127.0.0.1:{port}") as client:
        yield client


def some_members(dataset: Dataset) -> list[str | MemberView]:
    """Known ones (one twice), and a stranger with a history and a connection."""
    liked = (Engagement(dataset.items[6], 5, "like", 1),)
    stranger = MemberView(Member("", {"role": "fond of roses"}), liked, (Connection("author 1", "follows"),))
    return ["m0", "m3", stranger, "m7", "m0", MemberView(Member(""))]


@pytest.mark.parametrize(
    ("k", "wanted", "exclude"),
    [
        (7, EVERYTHING, ()),
        (0, Wanted(categories=frozenset({"chess", "gardens"})), ("i3", "nobody knows this")),
        (5, Wanted(by_connections=True), ()),
    ],
)
def test_a_batch_answers_as_each_alone(
    asked: Client, tiny_dataset: Dataset, k: int, wanted: Wanted, exclude: tuple[str, ...]
) -> None:
    members = some_members(tiny_dataset)
    together = asked.retrieve_batch(members, k, wanted=wanted, exclude=exclude, readable=True)
    for member, found in zip(members, together, strict=True):
        alone = asked.retrieve(member, k, wanted=wanted, exclude=exclude, readable=True)
        assert isinstance(found, Answer)
        assert (found.ids, found.snapshot, found.first_stage) == (alone.ids, alone.snapshot, alone.first_stage)
        assert alone.scores is not None or not alone.ids
        if alone.ids:
            np.testing.assert_allclose(found.scores, alone.scores, atol=1e-6)
        assert [row.title for row in found.rows] == [row.title for row in alone.rows]


def test_questions_of_a_batch_keep_their_own_sizes_and_wishes(asked: Client) -> None:
    questions = [
        pb.RetrieveRequest(member=member_message(who), k=k, instruction=wish)
        for who, k, wish in (("m1", 3, ""), ("m1", 9, ""), ("m1", 3, "chess endgames"), ("m2", 9, ""))
    ]
    stub: recommender_pb2_grpc.RecommenderStub = asked._stub
    rows = stub.RetrieveBatch(pb.RetrieveBatchRequest(requests=questions)).rows
    for question, row in zip(questions, rows, strict=True):
        assert unpack_ids(row.results.ids) == unpack_ids(stub.Retrieve(question).results.ids)
    assert [row.results.count for row in rows] == [3, 9, 3, 9]


def test_a_bad_member_is_refused_in_its_own_row(asked: Client) -> None:
    good = asked.retrieve("m5", 4).ids
    stranger = MemberView(Member("", {}), (Engagement(Item("nowhere"), 1, "like"),))
    found = asked.retrieve_batch(["m5", "no such member", stranger, "", "m5"], 4)
    assert [one.code if isinstance(one, ServiceError) else one.ids for one in found] == [
        *(good, "NOT_FOUND", "NOT_FOUND"),
        *("INVALID_ARGUMENT", good),
    ]
    assert isinstance(found[1], ServiceError) and "no such member" in found[1].details
    languages = asked.retrieve_batch(["m5"], 4, wanted=Wanted(languages=frozenset({"no"})))
    assert isinstance(languages[0], ServiceError) and "no column 'language'" in languages[0].details


def test_a_batch_has_limits(asked: Client) -> None:
    for members, k, words in (
        ([], 1, "none are given"),
        (["m1"] * (MAX_BATCH + 1), 1, "requests: 65"),
        (["m1"] * 7, 20_000, "k"),
    ):
        with pytest.raises(ServiceError, match=words) as caught:
            asked.retrieve_batch(members, k)
        assert caught.value.code == "INVALID_ARGUMENT"


def test_a_batch_keeps_the_vectors_that_it_made(asked: Client, stacks: dict[str, Stack]) -> None:
    members = stacks["dense"].members
    assert members is not None
    record = members.get("m9").record
    members.put([replace(record, member=replace(record.member, profile={"role": f"fond of {asked.info().first_stage}"}))])
    assert members.get("m9").vector is None
    asked.retrieve_batch(["m8", "m9"], 3)
    assert members.get("m9").vector is not None
    members.put([record])


def test_an_explanation_tells_the_places_of_the_answer(asked: Client, tiny_dataset: Dataset) -> None:
    everything = {*tiny_dataset.items.item_id, "new"} - {"i4"}
    wanted = Wanted(blocked_creators=frozenset({"author 3"}))
    for member in ("m3", some_members(tiny_dataset)[2]):
        whole = asked.recommend(member, 12, fanout=12, exclude=["i9"], wanted=wanted)
        assert whole.scores is not None and whole.probabilities is not None
        for item in sorted(everything):
            told = asked.explain(member, item, 5, fanout=12, exclude=["i9"], wanted=wanted)
            assert (told.known, told.candidates, told.fanout, told.k) == (True, 12, 12, 5)
            assert (told.snapshot, told.ranker, told.task) == (whole.snapshot, whole.ranker, whole.task)
            assert told.cosine is not None and told.probability is not None
            if item not in whole.ids:
                assert (told.place, told.first_place, told.first_score) == (None, None, None)
                assert told.outcome in ("SEEN", "EXCLUDED", "FILTERED", "NOT_RETRIEVED")
                assert (told.outcome == "NOT_RETRIEVED") == (not (told.seen or told.excluded or told.filtered))
                continue
            place = whole.ids.index(item)
            assert told.outcome == ("RETURNED" if place < 5 else "OUTRANKED") and not told.withdrawn
            assert (told.place, told.first_place) == (place, whole.places[place])
            assert told.probability == pytest.approx(whole.probabilities[place], abs=1e-6)
            assert told.first_score == pytest.approx(whole.scores[place], abs=1e-6)
            dense = told.lists[0]
            if told.first_stage == "dense":
                assert told.first_place == dense.place and told.cosine == pytest.approx(told.first_score, abs=1e-5)
            else:
                assert sum(one.adds or 0.0 for one in told.lists) == pytest.approx(told.first_score, abs=1e-6)


def test_each_reason_is_told(asked: Client, tiny_dataset: Dataset) -> None:
    view = some_members(tiny_dataset)[2]
    plain = asked.recommend(view, 60).ids
    assert asked.explain(view, "i6").outcome == "SEEN" and asked.explain(view, "i6", exclude=["i6"]).excluded
    assert asked.explain(view, plain[0], exclude=plain[:1]).outcome == "EXCLUDED"
    filtered = asked.explain(view, "new", wanted=Wanted(categories=frozenset({"chess"})))
    assert filtered.outcome == "FILTERED" and filtered.filtered and all(one.place is None for one in filtered.lists)
    for item, outcome in (("i4", "WITHDRAWN"), ("gone", "WITHDRAWN"), ("never", "NOT_IN_CATALOGUE")):
        told = asked.explain(view, item)
        assert (told.outcome, told.known, told.withdrawn) == (outcome, False, outcome == "WITHDRAWN")
        assert (told.cosine, told.probability, told.place) == (None, None, None)
        assert {one.row for one in told.prompts} == {"member"}
    last = asked.retrieve(view, 60).ids[-1]
    told = asked.explain(view, last, 1, fanout=1)
    assert told.outcome == "NOT_RETRIEVED" and told.lists[0].place is not None, "a list is read deeper than the fanout"
    with pytest.raises(ServiceError, match="item_id") as caught:
        asked.explain(view, "")
    assert caught.value.code == "INVALID_ARGUMENT"


def test_the_probability_of_what_was_no_candidate_is_what_rank_says(asked: Client) -> None:
    last = asked.retrieve("m3", 60).ids[-1]
    told = asked.explain("m3", last, 1, fanout=1)
    assert told.probability == pytest.approx(float(asked.rank("m3", [last]).probabilities[0]), abs=1e-6)


def test_prompts_are_the_models_own_rows(asked: Client, tiny_dataset: Dataset) -> None:
    told = asked.explain(some_members(tiny_dataset)[2], "i9", instruction="more about gambits")
    rows = {(one.model, one.row): one for one in told.prompts}
    assert set(rows) == {(model, row) for model in ("encoder", "ranker") for row in ("member", "item")}
    member, item = rows["ranker", "member"].text, rows["ranker", "item"].text
    assert "more about gambits" in member.replace("  ", " ") and "fond of roses" in member
    assert item.startswith("<|item|>") and "<|relation|>" in item and item.endswith("<|answer|>")
    assert all(one.tokens > 0 for one in told.prompts)


def test_the_command_explains(asked: Client) -> None:
    first = asked.recommend("m3", 3).ids[0]
    words = ["explain", first, "--member", "m3", "-k", "3", "--address", asked.address]
    shown = CliRunner().invoke(ask.app, words, env={"COLUMNS": "150"})
    assert shown.exit_code == 0, shown.exception
    for part in ("RETURNED", "list: dense", "number 1, probability", "ranker, item", "<|answer|>"):
        assert part in shown.stdout
    seen = json.loads(CliRunner().invoke(ask.app, [*words, "--exclude", first, "--json"]).stdout)
    assert (seen["outcome"], seen["place"], seen["excluded"]) == ("EXCLUDED", None, True)
    missing = CliRunner().invoke(ask.app, ["explain", "i[bold]99", *words[2:]], env={"COLUMNS": "150"})
    assert "NOT_IN_CATALOGUE" in missing.stdout and "Why i[bold]99" in missing.stdout


def test_the_lists_merge_to_the_candidates(stacks: dict[str, Stack], views: list[MemberView]) -> None:
    retriever = stacks["hybrid"].now().recommender.retriever
    wide, vector = Wide.over(retriever), retriever.describe(views[3])
    scope = wide.scope(views[3], ["i9"], EVERYTHING)
    lists = wide.lists(vector, 20, scope)
    assert [one.name for one in lists] == ["dense", "lexical", "popular"]
    rows, _ = fuse([one.rows for one in lists], [one.weight or 0.0 for one in lists], HybridSettings().constant, 20)
    alone = retriever.retrieve(vector, 20, ["i9", *(done.item.item_id for done in views[3].history)], views[3])
    assert wide.catalog.ids(rows) == alone.ids
