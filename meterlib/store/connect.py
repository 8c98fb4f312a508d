"""From a URL, or a client that is there already, to a driver."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Literal
from urllib.parse import urlsplit

from meterlib.errors import InvalidInput
from meterlib.store.drivers import AsyncDriver, SyncDriver
from meterlib.store.embedded import EmbeddedServer, parse_embedded_url
from meterlib.store.memory import AsyncMemoryDriver, MemoryDriver, MemoryStore
from meterlib.store.options import Clock, StoreOptions
from meterlib.store.wires import AsyncDirectWire, DirectWire

Face = Literal["sync", "async"]
_UNKNOWN = "one of its parts makes no sense, such as an unknown setting behind the ?"
_ENCODE = "a / ? # or @ in a user name or password is written %2F %3F %23 %40"
SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "embedded", "memory")


def driver_for_url(url: str, options: StoreOptions, clock: Clock | None, face: Face) -> Any:
    """A driver for a URL; nothing is opened yet.

    Raises:
        InvalidInput: the URL's scheme is unknown or its parts make no sense. The URL itself may hold a password, so the
            message does not repeat it.
    """
    scheme = check_url(url)
    if scheme == "memory":
        store = MemoryStore(options)
        return MemoryDriver(store, clock) if face == "sync" else AsyncMemoryDriver(store, clock)
    if scheme == "embedded":
        return embedded_driver(EmbeddedServer(parse_embedded_url(url)), options, clock, face)
    make = _cluster if scheme.endswith("+cluster") else _sentinel if scheme == "redis+sentinel" else _single
    try:
        client = make(url, options, face)
    except (ValueError, TypeError):
        raise InvalidInput("url", _UNKNOWN) from None
    return _driver(client, options, clock, face, direct=make is _single)


def _driver(
    client: Any, options: StoreOptions, clock: Clock | None, face: Face, *, direct: bool
) -> SyncDriver | AsyncDriver:
    """A driver for a client of our own; direct: it has but one server, so that calls need not go by the client."""
    if face == "sync":
        return SyncDriver(client, options, clock, wire=DirectWire(client.connection_pool) if direct else None)
    wire = AsyncDirectWire(client.connection_pool, options.timeout_ms) if direct else None
    return AsyncDriver(client, options, clock, wire=wire)


def check_url(url: str) -> str:
    """The scheme of a URL that leads to a store; opens nothing.

    Raises:
        InvalidInput: it does not; as of `driver_for_url`.
    """
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in SCHEMES:
        raise InvalidInput("url", f"must begin with one of {', '.join(f'{known}://' for known in SCHEMES)}")
    if scheme == "memory" and url != "memory://":
        raise InvalidInput("url", "memory:// has nothing behind it: every meter there has a store of its own")
    if scheme == "embedded":
        try:
            parse_embedded_url(url)
        except ValueError as error:
            raise InvalidInput("url", str(error)) from None
    if scheme not in ("memory", "embedded"):
        _check_parts(url, scheme)
    return scheme


def _check_parts(url: str, scheme: str) -> None:
    """What urllib and redis-py would take for something else, or would repeat in an error, password and all."""
    try:
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        ports = [urlsplit(f"//{host}").port for host in hosts]
    except ValueError:
        raise InvalidInput("url", f"its host or port makes no sense ({_ENCODE})") from None
    if parts.fragment or "@" in parts.path + parts.query:
        raise InvalidInput("url", _ENCODE)
    if 0 in ports:
        raise InvalidInput("url", f"its port makes no sense ({_ENCODE})")
    if len(ports) > 1 and scheme != "redis+sentinel":
        raise InvalidInput("url", "only redis+sentinel:// names several hosts")
    path = parts.path.strip("/")
    if scheme in ("redis", "rediss") and path and not (path.isascii() and path.isdigit()):
        raise InvalidInput("url", "the number of a database is needed behind the host, such as /0")
    if scheme.endswith("+cluster") and path not in ("", "0"):
        raise InvalidInput("url", "a cluster has no databases but 0")
    if scheme == "unix" and not path:
        raise InvalidInput("url", "the path of a socket is needed, such as unix:///run/valkey.sock")
    service, _, database = path.partition("/")
    if scheme == "redis+sentinel" and (not service or not (database or "0").isdigit()):
        raise InvalidInput("url", "a service is needed, and perhaps a database: redis+sentinel://host:26379/SERVICE/0")
    if parts.query:
        _check_settings(url, scheme)


def _check_settings(url: str, scheme: str) -> None:
    """Those behind the ?, which a cluster's client would look at with its first call, or not at all."""
    if scheme == "redis+sentinel":
        raise InvalidInput("url", "redis+sentinel:// takes no settings behind a ?")
    from redis import ConnectionPool

    try:
        pool = ConnectionPool.from_url(url.replace("+cluster", "", 1))
        pool.connection_class(**pool.connection_kwargs)
    except (ValueError, TypeError):
        raise InvalidInput("url", _UNKNOWN) from None


def shown_url(url: str) -> str:
    """Where a URL leads, for a message: without user, password and settings, any of which may be a secret."""
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class _Later:
    """A client that is made at its first call: a cluster's asks its nodes as soon as it is made."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._client: Any = None
        self._lock = Lock()

    def execute_command(self, *words: Any, **options: Any) -> Any:
        return self.made().execute_command(*words, **options)

    def made(self) -> Any:
        with self._lock:
            self._client = self._client or self._make()
        return self._client

    def close(self) -> None:
        if self._client:
            self._client.close()


def client_of(driver: Any) -> Any:
    """The redis-py client that a driver sends its calls by; None for a store in memory."""
    client = getattr(driver, "client", None)
    return client.made() if isinstance(client, _Later) else client


def driver_for_client(client: Any, options: StoreOptions, clock: Clock | None, face: Face) -> Any:
    """A driver for a ready-made client of redis-py or fakeredis.

    Raises:
        InvalidInput: an async client for a sync meter, or the other way round.
    """
    module = type(client).__module__
    execute = getattr(client, "execute_command", None)
    if execute is None:
        raise InvalidInput("client", f"a redis-py client or a URL is needed, not {type(client).__name__}")
    is_async = hasattr(client, "aclose")
    if is_async != (face == "async"):
        needed = "redis.asyncio" if face == "async" else "redis"
        raise InvalidInput("client", f"a client of {needed} is needed here, not {module}.{type(client).__name__}")
    driver = AsyncDriver if face == "async" else SyncDriver
    return driver(client, options, clock, plain=module.startswith("fakeredis"))


def embedded_driver(server: EmbeddedServer, options: StoreOptions, clock: Clock | None, face: Face) -> Any:
    """A driver whose server is started, or joined, at the first call, and taken over when its owner is gone."""
    client = _pooled(face, options, "unix", path=str(server.socket_path))
    driver = _driver(client, options, clock, face, direct=True)
    driver.server = server
    return driver


def _single(url: str, options: StoreOptions, face: Face) -> Any:
    if face == "async":
        from redis.asyncio import BlockingConnectionPool, Redis
    else:
        from redis import BlockingConnectionPool, Redis  # type: ignore[assignment]
    pool = BlockingConnectionPool.from_url(url, **_settings(options, face), **_pool_settings(options))
    pool.connection_class(**pool.connection_kwargs)  # says now if a setting of the URL is unknown; opens nothing
    return Redis.from_pool(pool)


def _pooled(face: Face, options: StoreOptions, kind: Literal["unix"], path: str) -> Any:
    if face == "async":
        from redis.asyncio import BlockingConnectionPool, Redis, UnixDomainSocketConnection
    else:
        from redis import BlockingConnectionPool, Redis, UnixDomainSocketConnection  # type: ignore[assignment]
    settings = _settings(options, face)
    settings.pop("socket_connect_timeout")
    pool = BlockingConnectionPool(
        connection_class=UnixDomainSocketConnection, path=path, **settings, **_pool_settings(options)
    )
    return Redis.from_pool(pool)


def _cluster(url: str, options: StoreOptions, face: Face) -> Any:
    if face == "async":
        from redis.asyncio.cluster import RedisCluster
    else:
        from redis.cluster import RedisCluster  # type: ignore[assignment]
    plain_url = url.replace("+cluster", "", 1)
    settings = _settings(options, face) | {"max_connections": options.connections_max}  # to each node
    if face == "async":
        # A slot that has moved is noted, and that is enough: redis-py would hang up on all calls to look for all nodes.
        return RedisCluster.from_url(plain_url, reinitialize_steps=0, **settings)
    return _Later(lambda: RedisCluster.from_url(plain_url, **settings))


def _sentinel(url: str, options: StoreOptions, face: Face) -> Any:
    """`redis+sentinel://[user:password@]host:port[,host:port…]/service[/db]`."""
    if face == "async":
        from redis.asyncio.sentinel import Sentinel
    else:
        from redis.sentinel import Sentinel  # type: ignore[assignment]
    parts = urlsplit(url)
    hosts, (service, _, database) = parts.netloc.rpartition("@")[2], parts.path.strip("/").partition("/")
    nodes = [
        (host or "localhost", int(port or 26379)) for host, _, port in (n.partition(":") for n in hosts.split(","))
    ]
    settings = _settings(options, face) | {
        "username": parts.username,
        "password": parts.password,
        "max_connections": options.connections_max,
    }
    sentinel: Any = Sentinel
    watchers = sentinel(nodes, sentinel_kwargs=_settings(options, face))
    return watchers.master_for(service, db=int(database or 0), **settings)


def _settings(options: StoreOptions, face: Face) -> dict[str, Any]:
    """Our drivers repeat calls themselves, under one deadline and one id; redis-py must not do so on its own.

    RESP2, since with RESP3 redis-py 8 hands out pooled connections that still hold another call's reply: it takes what
    is waiting there for a push message of its maintenance notifications.
    """
    from redis.backoff import NoBackoff

    if face == "async":
        from redis.asyncio.retry import Retry
    else:
        from redis.retry import Retry  # type: ignore[assignment]
    timeout_s = options.timeout_ms / 1000
    timeouts = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    return {"protocol": 2, "retry": Retry(NoBackoff(), 0), **timeouts}


def _pool_settings(options: StoreOptions) -> dict[str, Any]:
    return {"max_connections": options.connections_max, "timeout": options.deadline_ms / 1000}
