"""From a URL, or a client that is there already, to a driver."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from meterlib.errors import InvalidInput
from meterlib.store.drivers import (
    AsyncDriver,
    AsyncMemoryDriver,
    Clock,
    MemoryDriver,
    MemoryStore,
    StoreOptions,
    SyncDriver,
)
from meterlib.store.embedded import EmbeddedServer, parse_embedded_url

Face = Literal["sync", "async"]
SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "embedded", "memory")


def driver_for_url(url: str, options: StoreOptions, clock: Clock | None, face: Face) -> Any:
    """A driver for a URL; nothing is opened yet.

    Raises:
        InvalidInput: the URL's scheme is unknown or its parts make no sense. The URL itself may hold a password, so the
            message does not repeat it.
    """
    scheme = url.partition("://")[0] if isinstance(url, str) else ""
    if scheme not in SCHEMES:
        raise InvalidInput("url", f"its scheme must be one of {', '.join(f'{known}://' for known in SCHEMES)}")
    if scheme == "memory":
        store = MemoryStore(options)
        return MemoryDriver(store, clock) if face == "sync" else AsyncMemoryDriver(store, clock)
    driver = SyncDriver if face == "sync" else AsyncDriver
    if scheme == "embedded":
        try:
            server = EmbeddedServer(parse_embedded_url(url))
        except ValueError as error:
            raise InvalidInput("url", str(error)) from None
        return embedded_driver(server, options, clock, face)
    try:
        client = (
            _cluster(url, options, face)
            if scheme.endswith("+cluster")
            else (_sentinel(url, options, face) if scheme == "redis+sentinel" else _single(url, options, face))
        )
    except ValueError as error:
        raise InvalidInput("url", f"cannot be understood: {_without(url, str(error))}") from None
    return driver(client, options, clock)


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
    driver: SyncDriver | AsyncDriver = (SyncDriver if face == "sync" else AsyncDriver)(client, options, clock)
    driver.server = server
    return driver


def _single(url: str, options: StoreOptions, face: Face) -> Any:
    if face == "async":
        from redis.asyncio import BlockingConnectionPool, Redis
    else:
        from redis import BlockingConnectionPool, Redis  # type: ignore[assignment]
    pool = BlockingConnectionPool.from_url(url, **_settings(options, face), **_pool_settings(options))
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
    if urlsplit(url).path not in ("", "/", "/0"):
        raise ValueError("a cluster has no databases but 0")
    return RedisCluster.from_url(url.replace("+cluster", "", 1), **_settings(options, face))


def _sentinel(url: str, options: StoreOptions, face: Face) -> Any:
    """`redis+sentinel://[user:password@]host:port[,host:port…]/service[/db]`."""
    if face == "async":
        from redis.asyncio.sentinel import Sentinel
    else:
        from redis.sentinel import Sentinel  # type: ignore[assignment]
    parts = urlsplit(url)
    hosts, (service, _, database) = parts.netloc.rpartition("@")[2], parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("the service's name is missing: redis+sentinel://host:26379/SERVICE")
    nodes = [
        (host or "localhost", int(port or 26379)) for host, _, port in (n.partition(":") for n in hosts.split(","))
    ]
    settings = _settings(options, face) | {"username": parts.username, "password": parts.password}
    sentinel: Any = Sentinel
    watchers = sentinel(nodes, sentinel_kwargs=_settings(options, face))
    return watchers.master_for(service, db=int(database or 0), **settings)


def _settings(options: StoreOptions, face: Face) -> dict[str, Any]:
    """Our drivers repeat calls themselves, under one deadline and one id; redis-py must not do so on its own."""
    from redis.backoff import NoBackoff

    if face == "async":
        from redis.asyncio.retry import Retry
    else:
        from redis.retry import Retry  # type: ignore[assignment]
    timeout_s = options.timeout_ms / 1000
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": Retry(NoBackoff(), 0)}


def _pool_settings(options: StoreOptions) -> dict[str, Any]:
    return {"max_connections": options.connections_max, "timeout": options.deadline_ms / 1000}


def _without(url: str, message: str) -> str:
    """A message about a URL without the URL's credentials."""
    credentials = urlsplit(url).netloc.rpartition("@")[0]
    return message.replace(url, "the URL").replace(credentials, "***") if credentials else message
