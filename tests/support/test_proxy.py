"""Each fault of the proxy does to a request exactly what it says, told by a counter on a real server."""

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.support.proxy import FaultProxy, RespFrames
from tests.support.servers import Server, start_server, wait_until

COUNT = "return redis.call('INCR', KEYS[1])"


@pytest.fixture
def direct(server: Server) -> redis.Redis:
    """A client that goes past the proxy, to an emptied server."""
    client = server.client()
    client.flushall()
    return client


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as running:
        yield running


@pytest.fixture(params=[2, 3])
def client(request: pytest.FixtureRequest, server: Server, proxy: FaultProxy) -> Iterator[redis.Redis]:
    with server.client(port=proxy.port, protocol=request.param) as connected:
        connected.ping()  # so that a fault meets the test's own requests, and time-outs need not cover the handshake
        yield connected


def count(client: redis.Redis) -> object:
    """Add one to the counter, by EVALSHA as a library would."""
    return client.evalsha(client.script_load(COUNT), 1, "n")


def executed(proxy: FaultProxy, word: bytes = b"EVALSHA") -> int:
    return sum(word in words for words in list(proxy.executed))


def send(proxy: FaultProxy, data: bytes) -> bytes:
    """Send bytes as they are and read until the proxy closes or answers."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw:
        raw.sendall(data)
        return raw.recv(1000)


def test_requests_pass_unharmed(direct: redis.Redis, client: redis.Redis, proxy: FaultProxy) -> None:
    assert [count(client) for _ in range(3)] == [1, 2, 3]
    assert direct.get("n") == b"3"
    assert executed(proxy) == 3
    assert proxy.executed[-1].endswith(b" 1 n")
    assert proxy.faults == 0
    assert proxy.url == f"redis://127.0.0.1:{proxy.port}/0"


@pytest.mark.parametrize("protocol", [2, 3])
def test_every_type_of_reply_passes(direct: redis.Redis, server: Server, proxy: FaultProxy, protocol: int) -> None:
    values = [f"value {number}" * (number % 50) for number in range(500)]
    direct.rpush("list", *values)
    direct.hset("hash", mapping={f"{number}": value for number, value in enumerate(values)})
    direct.zadd("sorted", {f"{number}": number / 3 for number in range(100)})
    direct.set("binary", bytes(range(256)) * 10_000)
    past: Callable[..., object] = server.client(protocol=protocol).execute_command
    via: Callable[..., object] = server.client(port=proxy.port, protocol=protocol).execute_command
    for command in (
        ("LRANGE", "list", 0, -1),
        ("HGETALL", "hash"),
        ("ZRANGE", "sorted", 0, -1, "WITHSCORES"),
        ("GET", "binary"),
        ("GET", "missing"),
        ("EVAL", "return {1, 'two', {3, {}, false, {{'deep'}}}, 'five'}", 0),
        ("EVAL", "return redis.status_reply('FINE')", 0),
        ("COMMAND", "INFO", "get", "hset"),
        ("CONFIG", "GET", "max*"),
        ("LOLWUT", "VERSION", 5, 1, 1, 1),
    ):
        assert via(*command) == past(*command)
    with pytest.raises(redis.ResponseError, match="not an integer"):
        via("INCR", "binary")


def test_all_types_of_resp3_script_replies_pass(direct: redis.Redis, client: redis.Redis) -> None:
    script = """
    redis.setresp(3)
    return {{double = 2.5}, {map = {a = 1}}, {set = {b = true}}, {big_number = '123'}, true,
            {verbatim_string = {format = 'txt', string = 'x'}}}
    """
    reply = client.eval(script, 0)
    assert isinstance(reply, list)
    assert len(reply) == 6
    assert client.echo("after") == b"after"


def test_pushes_are_no_replies(direct: redis.Redis, server: Server, proxy: FaultProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw, raw.makefile("rb") as stream:
        raw.sendall(b"HELLO 3\r\nCLIENT TRACKING ON\r\nGET k\r\n")
        while stream.readline() != b"_\r\n":
            pass
        direct.set("k", "v")
        assert stream.readline() == b">2\r\n"
        assert [stream.readline() for _ in range(5)][3:] == [b"$1\r\n", b"k\r\n"]
        proxy.garble_replies(1, b"+second\r\n", matching=b"PING")
        raw.sendall(b"ECHO first\r\nPING\r\n")
        assert [stream.readline() for _ in range(3)] == [b"$5\r\n", b"first\r\n", b"+second\r\n"]


def test_dropped_replies_were_executed(direct: redis.Redis, client: redis.Redis, proxy: FaultProxy) -> None:
    proxy.drop_replies(2)
    for played in (1, 2):
        with pytest.raises(redis.ConnectionError):
            count(client)
        assert direct.get("n") == b"%d" % played
        assert proxy.faults == played
    assert count(client) == 3
    assert executed(proxy) == 3


def test_swallowed_replies_were_executed(
    direct: redis.Redis, client: redis.Redis, proxy: FaultProxy, server: Server
) -> None:
    proxy.swallow_replies(1)
    with server.client(port=proxy.port, socket_timeout=0.5) as impatient, pytest.raises(redis.TimeoutError):
        count(impatient)
    assert direct.get("n") == b"1"
    assert proxy.faults == executed(proxy) == 1
    assert count(client) == 2


def test_swallowing_leaves_the_connection_open_and_mute(direct: redis.Redis, proxy: FaultProxy) -> None:
    proxy.swallow_replies(1, matching=b"INCR n")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw:
        raw.sendall(b"INCR n\r\nINCR m\r\nINCR n\r\n")
        wait_until(lambda: direct.get("n") == b"2", "both requests")
        raw.settimeout(0.2)
        with pytest.raises(TimeoutError):
            raw.recv(1)
    assert direct.get("m") == b"1"


def test_delayed_requests_arrive_after_their_client_left(
    direct: redis.Redis, client: redis.Redis, proxy: FaultProxy, server: Server
) -> None:
    with server.client(port=proxy.port, socket_timeout=0.5) as impatient:
        impatient.script_load(COUNT)
        proxy.delay_requests(1, 2.0)
        with pytest.raises(redis.TimeoutError):
            count(impatient)
    assert direct.get("n") is None
    assert proxy.faults == 1
    assert executed(proxy) == 0
    assert count(client) == 1  # overtakes the late one
    wait_until(lambda: direct.get("n") == b"2", "the late request")
    assert executed(proxy) == 2


def test_delayed_requests_are_answered_to_patient_clients(client: redis.Redis, proxy: FaultProxy) -> None:
    proxy.delay_requests(1, 0.1)
    client.delete("n")
    assert count(client) == 1
    assert proxy.faults == 1


def test_cut_requests_were_not_executed(direct: redis.Redis, client: redis.Redis, proxy: FaultProxy) -> None:
    proxy.cut_requests(1)
    with pytest.raises(redis.ConnectionError):
        count(client)
    assert proxy.faults == 1
    assert count(client) == 1
    assert direct.get("n") == b"1"
    assert executed(proxy) == 1


def test_requests_before_a_cut_one_were_executed(direct: redis.Redis, proxy: FaultProxy) -> None:
    proxy.cut_requests(1, matching=b"INCR b")
    send(proxy, b"INCR a\r\nINCR b\r\nINCR c\r\n")
    wait_until(lambda: direct.get("a") == b"1", "the request before the cut one")
    assert direct.mget("a", "b", "c") == [b"1", None, None]


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"-LOADING please wait\r\n", redis.BusyLoadingError),
        (b"-ERR odd\r\n", redis.ResponseError),
        (b"@nonsense\r\n", redis.RedisError),
    ],
)
def test_garbled_replies_were_executed(
    direct: redis.Redis, client: redis.Redis, proxy: FaultProxy, payload: bytes, error: type[Exception]
) -> None:
    proxy.garble_replies(1, payload)
    with pytest.raises(error):
        count(client)
    assert direct.get("n") == b"1"
    assert proxy.faults == 1
    assert count(client) == 2


def test_garbled_reply_can_be_a_wrong_value(direct: redis.Redis, client: redis.Redis, proxy: FaultProxy) -> None:
    proxy.garble_replies(1, b":99\r\n")
    assert [count(client), count(client)] == [99, 2]


def test_refusing_ends_present_connections_and_new_ones(
    direct: redis.Redis, client: redis.Redis, proxy: FaultProxy
) -> None:
    assert count(client) == 1
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw:
        raw.sendall(b"PING\r\n")
        assert raw.recv(100) == b"+PONG\r\n"
        proxy.refuse(True)
        assert raw.recv(1) == b""
    for _ in range(3):
        with pytest.raises(redis.ConnectionError):
            count(client)
    assert direct.get("n") == b"1"
    proxy.refuse(False)
    assert count(client) == 2
    assert proxy.faults == 0


def test_latency_is_added_to_each_request(direct: redis.Redis, proxy: FaultProxy, server: Server) -> None:
    with server.client(port=proxy.port, socket_timeout=0.5) as impatient:
        assert impatient.incr("n") == 1
        proxy.delay_all(1.5)
        with pytest.raises(redis.TimeoutError):
            impatient.incr("n")
        assert direct.get("n") == b"1"
        proxy.delay_all(0)
        wait_until(lambda: direct.get("n") == b"2", "the late request")
        assert impatient.incr("n") == 3


def test_faults_meet_whole_matching_commands_only(direct: redis.Redis, client: redis.Redis, proxy: FaultProxy) -> None:
    proxy.garble_replies(1, b"+a\r\n", matching=b"SET key:a")
    proxy.garble_replies(1, b"+any\r\n", matching=b"SET")
    proxy.garble_replies(1, b"+none\r\n", matching=b"\r\n")
    with client.pipeline(transaction=False) as pipeline:
        for key in ("key:b", "key:a", "key:a"):
            pipeline.set(key, "x", get=True)
        pipeline.getdel("key:b")
        assert pipeline.execute() == [b"any", b"a", b"x", b"x"]
    assert proxy.executed[-4:] == [b"SET key:b x GET", b"SET key:a x GET", b"SET key:a x GET", b"GETDEL key:b"]
    assert proxy.faults == 2


def test_transactions_are_dropped_whole(direct: redis.Redis, client: redis.Redis, proxy: FaultProxy) -> None:
    proxy.drop_replies(1, matching=b"EXEC")
    with client.pipeline(transaction=True) as pipeline:
        pipeline.incr("n")
        pipeline.incr("n")
        with pytest.raises(redis.ConnectionError):
            pipeline.execute()
    assert direct.get("n") == b"2"


def test_requests_may_arrive_byte_by_byte(direct: redis.Redis, proxy: FaultProxy) -> None:
    proxy.garble_replies(1, b"+garbled\r\n", matching=b"INCR n")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw, raw.makefile("rb") as stream:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n":
            raw.sendall(bytes([byte]))
        assert [stream.readline(), stream.readline()] == [b"+garbled\r\n", b":2\r\n"]


def test_big_requests_and_replies_pass(direct: redis.Redis, client: redis.Redis, proxy: FaultProxy) -> None:
    big = random.Random(1).randbytes(5_000_000)
    with client.pipeline(transaction=False) as pipeline:
        for number in range(4):
            pipeline.set(f"big:{number}", big)
            pipeline.get(f"big:{number}")
            pipeline.incr("n")
        assert pipeline.execute() == [True, big, 1, True, big, 2, True, big, 3, True, big, 4]


def test_server_that_dies_ends_its_connections_only(tmp_path: Path, server: Server) -> None:
    with start_server(tmp_path, server.kind) as mortal, FaultProxy(mortal.port) as proxy:
        client = mortal.client(port=proxy.port)
        assert client.incr("n") == 1
        mortal.kill()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.incr("n")
        mortal.start()
        assert client.incr("n") == 1


def test_many_clients_at_once(direct: redis.Redis, proxy: FaultProxy, server: Server) -> None:
    proxy.drop_replies(20)
    lost: list[int] = []

    def work(number: int) -> None:
        with server.client(port=proxy.port) as client:
            for _ in range(50):
                try:
                    count(client)
                except redis.ConnectionError:
                    lost.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert direct.get("n") == b"400"
    assert len(lost) == proxy.faults == 20
    assert executed(proxy) == 400


def test_async_clients_are_served(direct: redis.Redis, proxy: FaultProxy) -> None:
    async def work() -> list[object]:
        seen: list[object] = []
        no_retry = Retry(NoBackoff(), 0)
        async with redis.asyncio.Redis(port=proxy.port, socket_timeout=0.5, retry=no_retry) as client:
            await client.ping()
            orders: list[Callable[[], None]] = [
                lambda: None,
                lambda: proxy.drop_replies(1, matching=b"INCR"),
                lambda: proxy.swallow_replies(1, matching=b"INCR"),
                lambda: proxy.cut_requests(1, matching=b"INCR"),
                lambda: proxy.garble_replies(1, b":0\r\n", matching=b"INCR"),
            ]
            for order in orders:
                order()
                try:
                    seen.append(await client.incr("n"))
                except redis.RedisError as error:
                    seen.append(type(error))
            seen.append(await asyncio.gather(*(client.incr("m") for _ in range(20))))
        return seen

    *seen, together = asyncio.run(work())
    assert seen == [1, redis.ConnectionError, redis.TimeoutError, redis.ConnectionError, 0]
    assert isinstance(together, list)
    assert sorted(together) == list(range(1, 21))
    assert direct.get("n") == b"4"
    assert proxy.faults == 4


def test_proxy_ends_with_requests_in_flight(direct: redis.Redis, server: Server) -> None:
    with FaultProxy(server.port) as proxy, socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw:
        proxy.delay_requests(1, 3600, matching=b"INCR")
        raw.sendall(b"INCR n\r\n")
        wait_until(lambda: proxy.faults == 1, "the fault")
    assert not [thread for thread in threading.enumerate() if thread.name == "fault-proxy"]
    assert direct.get("n") is None


def test_frames_are_cut_the_same_however_the_bytes_arrive() -> None:
    frames = [
        b"+OK\r\n",
        b"-ERR no\r\n",
        b":-7\r\n",
        b"$-1\r\n",
        b"$0\r\n\r\n",
        b"$4\r\n\r\n$1\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*3\r\n:1\r\n*2\r\n$1\r\nx\r\n*0\r\n_\r\n",
        b"%2\r\n+a\r\n:1\r\n+b\r\n%0\r\n",
        b"~2\r\n#t\r\n,1.5\r\n",
        b">2\r\n+message\r\n*1\r\n:1\r\n",
        b"|1\r\n+ttl\r\n:9\r\n*1\r\n(123\r\n",
        b"=5\r\ntxt:x\r\n",
        b"!5\r\nERR x\r\n",
        b"PING\r\n",
    ]
    stream = b"".join(frames)
    assert RespFrames().feed(stream) == frames
    chance = random.Random(3)
    for _ in range(300):
        cutter, got, rest = RespFrames(), list[bytes](), stream
        while rest:
            size = chance.randint(1, 12)
            got += cutter.feed(rest[:size])
            rest = rest[size:]
        assert got == frames
