"""The key-value store in Redis, alone or as a cluster.

A key is `brewline|{KIND|FINGERPRINT|BUCKET}|ID`, every field percent-encoded, so no id can leave its field, and BUCKET one of
64 by the id's CRC. Only the braces decide the cluster slot: ids of a bucket can be asked together, buckets spread over nodes.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TimeoutError,
    TryAgainError,
)
from redis.retry import Retry

from index.keyvalue import Key, StoreError, StoreUnavailable, check_ttl, encode_key

_OPTIONS = {"db", "username", "password", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs"}
_BUCKETS = 64
_CONNECT_S = 2.0
_PASSING = re.compile(r"\b(MISCONF|NOREPLICAS)\b")
"""Refusals that say nothing of what was asked (the disk is full, the replicas are gone) and have no class in redis-py."""
_CHUNK = 1_024
"""Keys per round trip: enough to hide the network, few enough that Redis serves others in between."""

_SWAP = """
local found = redis.call('GET', KEYS[1])
if (ARGV[1] == '') ~= (found == false) or (found and found ~= ARGV[2]) then return 0 end
if ARGV[4] == '' then redis.call('SET', KEYS[1], ARGV[3]) else redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4]) end
return 1
"""
"""Key; whether there was a value ('' no), that value, the new one, its milliseconds ('' for ever). Redis runs it in one step."""


class RedisStore:
    """A `KeyValueStore` in Redis. The server's clock decides what has expired. Connects at first use, not before.

    URLs: redis://[[user]:password@]host:port/db, rediss:// (TLS), unix://path, redis+cluster:// and rediss+cluster://.
    Neither user nor password appears in any message or representation. An answer is waited for `patience_s` seconds.
    """

    def __init__(self, url: str, patience_s: float) -> None:
        self._url, self._patience_s = url, patience_s
        self.shown, self._secrets = _public(url)
        self._client: Any = None
        self._closed = False

    def __repr__(self) -> str:
        return f"RedisStore({self.shown!r})"

    def get_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> list[bytes | None]:
        """See KeyValueStore."""
        keys = [_key(kind, one, fingerprint) for one in ids]
        found: dict[str, bytes | None] = {}
        with self._errors() as client:
            for chunk in _chunks(list(dict.fromkeys(keys))):
                pipe = client.pipeline(transaction=False)
                if isinstance(client, RedisCluster):
                    # A cluster pipeline refuses MGET; its plain GETs still travel as one message per node.
                    for key in chunk:
                        pipe.get(key)
                    found.update(zip(chunk, pipe.execute()))
                else:
                    groups = list(_by_tag(chunk).values())
                    for group in groups:
                        pipe.mget(group)
                    for group, values in zip(groups, pipe.execute()):
                        found.update(zip(group, values))
        return [found[key] for key in keys]

    def get_each(self, keys: Sequence[Key]) -> list[bytes | None]:
        """See KeyValueStore; a cluster is asked one by one, for its nodes do not wait for each other."""
        if not keys:
            return []
        with self._errors() as client:
            if isinstance(client, RedisCluster):
                return [self.get_many(kind, [one], fingerprint)[0] for kind, one, fingerprint in keys]
            pipe = client.pipeline(transaction=False)
            for kind, one, fingerprint in keys:
                pipe.get(_key(kind, one, fingerprint))
            return list(pipe.execute())

    def put_many(self, kind: str, values: Mapping[str, bytes], fingerprint: str = "", ttl_s: float | None = None) -> None:
        """See KeyValueStore."""
        check_ttl(ttl_s)
        pairs = [(_key(kind, one, fingerprint), bytes(memoryview(value))) for one, value in values.items()]
        lifetime = None if ttl_s is None else max(1, round(ttl_s * 1000))
        with self._errors() as client:
            for chunk in _chunks(pairs):
                pipe = client.pipeline(transaction=False)
                for key, value in chunk:
                    pipe.set(key, value, px=lifetime)
                pipe.execute()

    def swap(self, kind: str, one: str, old: bytes | None, new: bytes, fingerprint: str = "", ttl_s: float | None = None) -> bool:
        """See KeyValueStore."""
        check_ttl(ttl_s)
        lifetime = "" if ttl_s is None else max(1, round(ttl_s * 1000))
        with self._errors() as client:
            asked = ("" if old is None else "1", old or b"", new, lifetime)
            return bool(client.eval(_SWAP, 1, _key(kind, one, fingerprint), *asked))

    def delete_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> None:
        """See KeyValueStore."""
        keys = [_key(kind, one, fingerprint) for one in ids]
        with self._errors() as client:
            for chunk in _chunks(keys):
                pipe = client.pipeline(transaction=False)
                for key in chunk:
                    pipe.delete(key)
                pipe.execute()

    def ids(self, kind: str, fingerprint: str = "") -> Iterator[str]:
        """See KeyValueStore; SCAN walks all keys of the server, and the ids seen are held to yield each once."""
        pattern = f"brewline|{{{_field(kind, 'kind')}|{_field(fingerprint, 'fingerprint')}|*}}|*"
        with self._errors() as client:
            seen: set[bytes] = set()
            for key in client.scan_iter(match=pattern, count=_CHUNK):
                if key not in seen:
                    seen.add(key)
                    yield unquote(key.rpartition(b"|")[2].decode("ascii"))

    def ping(self) -> None:
        """See KeyValueStore."""
        with self._errors() as client:
            client.ping()

    def close(self) -> None:
        """See KeyValueStore."""
        self._closed = True
        if self._client is not None:
            self._client.close()

    def _connect(self) -> Any:
        if self._closed:
            raise StoreError(f"store {self.shown} is closed")
        if self._client is None:
            scheme, _, rest = self._url.partition("://")
            # Once more for a connection that the server has closed meanwhile; never for one that keeps silent, which would only
            # double the wait.
            retry = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
            connect_s = min(_CONNECT_S, self._patience_s)
            url = f"{scheme.removesuffix('+cluster')}://{rest}"
            kind: Any = RedisCluster if scheme.endswith("+cluster") else redis.Redis
            try:
                self._client = kind.from_url(url, socket_connect_timeout=connect_s, socket_timeout=self._patience_s, retry=retry)
            except ValueError as error:
                raise StoreError(f"store {self.shown}: the address is not understood: {self._told(error)}") from None
        return self._client

    @contextmanager
    def _errors(self) -> Iterator[Any]:
        """The client is yielded. Library errors are re-told without their cause, which may quote the address."""
        try:
            yield self._connect()
        except AuthenticationError as error:
            raise StoreUnavailable(f"store {self.shown} refuses these credentials: {self._told(error)}") from None
        except (ConnectionError, TimeoutError, ClusterDownError) as error:
            raise StoreUnavailable(f"store {self.shown} cannot be reached: {self._told(error)}") from None
        except RedisClusterException as error:
            raise StoreUnavailable(f"store {self.shown} is no reachable cluster: {self._told(error)}") from None
        except RedisError as error:
            passing = isinstance(error, OutOfMemoryError | ReadOnlyError | TryAgainError) or _PASSING.search(str(error))
            kind = StoreUnavailable if passing else StoreError
            raise kind(f"store {self.shown} refuses: {self._told(error)}") from None

    def _told(self, error: Exception) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _public(url: str) -> tuple[str, list[str]]:
    """The address without user, password and options is returned, and every text that must never be shown.

    Raises StoreError, which quotes nothing but the scheme, for an address that cannot be taken apart: with a slash or a hash
    left unescaped in it, a password would end up among the parts that are shown.
    """
    scheme = url.partition(":")[0]
    try:
        parts = urlsplit(url)
        port, options = parts.port, parse_qs(parts.query, strict_parsing=bool(parts.query))
        clear = "@" not in parts.path + parts.fragment and set(options) <= _OPTIONS
    except ValueError:
        clear = False
    if not clear or not (parts.hostname or scheme == "unix"):
        raise StoreError(
            f"store address {scheme}://... is not understood: expected {scheme}://[user:password@]host:port/db, special "
            f"characters percent-encoded, options among {', '.join(sorted(_OPTIONS))}"
        )
    place = (parts.hostname or "") + (f":{port}" if port is not None else "")
    secrets = {parts.username or "", parts.password or "", *options.get("password", []), *options.get("username", [])}
    secrets = {text for one in secrets for text in (one, unquote(one), quote(one, safe="")) if text}
    return f"{scheme}://{place}{parts.path}", sorted(secrets, key=len, reverse=True)


def _field(text: str, what: str) -> str:
    return quote(encode_key(text, what), safe="")


def _key(kind: str, one: str, fingerprint: str) -> str:
    bucket = zlib.crc32(encode_key(one, "id")) % _BUCKETS
    return f"brewline|{{{_field(kind, 'kind')}|{_field(fingerprint, 'fingerprint')}|{bucket:02d}}}|{_field(one, 'id')}"


def _by_tag(keys: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[key[: key.index("}")]].append(key)
    return groups


def _chunks(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(keys), _CHUNK):
        yield keys[start : start + _CHUNK]
