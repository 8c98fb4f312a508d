"""A real PostgreSQL for tests: its own folder, a free port of loopback, ended with the tests, whoever runs them."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any, Self

import psycopg

from tests.support.servers import wait_until

PASSWORD = "s3cret-canary"
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/local/pgsql/bin")
_USERS = ("postgres", "nobody")
_FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "16MB", "max_wal_size": "64MB"}


def binaries() -> Path | None:
    """The folder with the server's programs, the newest if there are several; None if there is none."""
    for pattern in _PLACES:
        found = [folder for folder in Path("/").glob(pattern[1:]) if (folder / "initdb").exists()]
        if found:
            return max(
                found, key=lambda folder: [int(word) for word in folder.parent.name.split(".") if word.isdigit()]
            )
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


def _version(folder: Path) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", folder.parent.name)]


def available() -> str | None:
    """Tell why there can be no server here, or None if there can."""
    if binaries() is None:
        return "no PostgreSQL server is installed"
    return "a server refuses to run as root, and there is no other user" if os.getuid() == 0 and not _user() else None


def _user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in _USERS if name in names), None)


def _as_user() -> dict[str, Any]:
    """How a process is started that must not be root's."""
    if os.getuid() != 0:
        return {}
    entry = pwd.getpwnam(str(_user()))
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


class PostgresServer:
    """One running server; a context manager that leaves neither process nor folder behind."""

    def __init__(self) -> None:
        self._bin = binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="meterlib-postgres-"))  # tests' own folders are closed to others
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._make()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        """Where it is, without a password; its owner may do everything."""
        return f"postgresql://owner@127.0.0.1:{self.port}/postgres?sslmode=disable&gssencmode=disable"

    @property
    def secret_url(self) -> str:
        """The same with the password."""
        return self.url.replace("owner@", f"owner:{PASSWORD}@")

    def connect(self) -> psycopg.Connection[Any]:
        """A connection of the owner's, each statement by itself."""
        return psycopg.connect(self.secret_url, autocommit=True)

    def _make(self) -> None:
        if os.getuid() == 0:
            entry = pwd.getpwnam(str(_user()))
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        subprocess.run(
            [
                f"{self._bin}/initdb", "-D", f"{self.folder}/data", "-U", "owner", f"--pwfile={password}", "--no-sync",
                "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C",
            ],
            cwd=self.folder, check=True, capture_output=True, **_as_user(),
        )  # fmt: skip

    def start(self) -> None:
        """Start it; a second time on the same folder and port."""
        for _ in range(5):
            if not self.port or self._process is None:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    self.port = free.getsockname()[1]
            if self._launched():
                return
            self._process = None
        raise RuntimeError((self.folder / "log").read_text(errors="replace")[-3000:])

    def _launched(self) -> bool:
        settings = {"port": str(self.port), "listen_addresses": "127.0.0.1", "unix_socket_directories": "", **_FAST}
        words = [f"{self._bin}/postgres", "-D", f"{self.folder}/data"]
        words += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        # It ends when whoever started it does; the signal comes when the starting thread ends, so only if that is the
        # main one.
        setpriv = shutil.which("setpriv")
        if setpriv and threading.current_thread() is threading.main_thread():
            words = [setpriv, "--pdeathsig", "QUIT", *words]
        with (self.folder / "log").open("ab") as log:
            process = self._process = subprocess.Popen(
                words, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                **_as_user(),
            )  # fmt: skip
        weakref.finalize(self, _end, process, os.getpid())
        wait_until(lambda: process.poll() is not None or self._answers(), "PostgreSQL's first answer", 30)
        return process.poll() is None

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """End it at once, as a crash would; what was committed is recovered by the next start."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)


class CommitProxy:
    """Stands before a server; `orders` says what becomes of the next commits: `pass`, `lose`, or `lose the answer`."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.orders: list[str] = []
        self.spoilt = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            muted = threading.Event()
            for act, *between in ((self._forward, client, server), (self._back, server, client)):
                threading.Thread(target=act, args=(*between, muted), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket, muted: threading.Event) -> None:
        while data := _received(client):
            order = self.orders.pop(0) if b"COMMIT" in data and self.orders else ""
            self.spoilt += order.startswith("lose")
            if order == "lose":
                break
            if order == "lose the answer":
                muted.set()
            server.sendall(data)
            if order == "lose the answer":
                return  # which ends it, when it comes
        _close(client, server)

    def _back(self, server: socket.socket, client: socket.socket, muted: threading.Event) -> None:
        while (data := _received(server)) and not muted.is_set():
            try:
                client.sendall(data)
            except OSError:
                break
        _close(client, server)


def _close(*peers: socket.socket) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)
        peer.close()


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1 << 16)
    except OSError:
        return b""
