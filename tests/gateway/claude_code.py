"""Claude Code itself, run without any network but a way to one server of the test's.

    claude = await installed(folder)                    # npm puts it there; Unavailable tells why it cannot
    async with Tunnel(folder, gateway.url) as tunnel:
        run = await tunnel.run(claude, "-p", "say hi", "--output-format", "json")

Claude Code runs in a network namespace of its own, where nothing but the loopback device exists: whatever it might want
to send elsewhere has nowhere to go. A socket file leads out of it. This file, run as a script inside the namespace,
listens on 127.0.0.1 there and passes all bytes on to the socket file; the test's process passes them on to its server:

    claude ── 127.0.0.1:PORT ── relay (inside) ══ socket file ══ relay (outside) ── 127.0.0.1:… ── gateway
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import platform
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

VERSION = "2.1.330"
BINARY_VARIABLE = "METERLIB_CLAUDE_CODE"
"""The path of a Claude Code that is here already, to be taken instead of installing one."""

INSIDE_PORT = 8787
INSTALL_SECONDS_MAX = 300.0
RUN_SECONDS_MAX = 60.0

ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",  # it also turns the discovery of models off
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_MAX_RETRIES": "2",
}
"""What it starts with: nothing of the machine's own environment, and no wish to call anybody but its API."""


class Unavailable(Exception):
    """Claude Code cannot be had or run here; says why."""


@dataclass(frozen=True)
class Run:
    """How one run of Claude Code ended."""

    code: int
    out: str
    err: str
    elapsed_s: float

    def json(self) -> Any:
        """What `--output-format json` printed."""
        return json.loads(self.out)

    def events(self) -> list[Any]:
        """What `--output-format stream-json` printed."""
        return [json.loads(line) for line in self.out.splitlines()]


# ── Installing ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def installed(folder: Path, version: str = VERSION) -> Path:
    """The binary; npm installs it into the folder (some 400 MB) unless the environment names one.

    Raises:
        Unavailable: it is not for this machine, npm is missing or cannot get it, or namespaces are not allowed.
    """
    await _check_namespaces()
    if named := os.environ.get(BINARY_VARIABLE):
        return Path(named)
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine())
    npm = shutil.which("npm")
    if machine is None or npm is None:
        raise Unavailable(f"no npm, or no Claude Code for {platform.machine()}")
    # The main package only fetches this one, and copies its binary in a script after the installation.
    package = f"@anthropic-ai/claude-code-linux-{machine}"
    options = ["--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--force", "--fetch-retries=1"]
    code, _, err = await _finished(npm, "install", "--prefix", str(folder), *options, f"{package}@{version}")
    binary = folder / "node_modules" / package / "claude"
    if code or not binary.exists():
        raise Unavailable(f"npm cannot install {package}@{version}: {err[-300:]}")
    return binary


async def _check_namespaces() -> None:
    if sys.platform != "linux" or not shutil.which("unshare"):
        raise Unavailable("network namespaces need Linux and unshare")
    code, _, err = await _finished("unshare", *_UNSHARE, "true")
    if code:
        raise Unavailable(f"network namespaces are not allowed here: {err.strip()}")


_UNSHARE = ("--map-root-user", "--net")


async def _finished(*command: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), INSTALL_SECONDS_MAX)
    except TimeoutError:
        raise Unavailable(f"{command[0]} takes too long") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), err.decode()


# ── Running, outside ──────────────────────────────────────────────────────────────────────────────────────────────────


class Tunnel:
    """A way for Claude Code to one server, while the context lasts.

    Attributes:
        url: the server as Claude Code sees it.

    """

    def __init__(self, folder: Path, url: str) -> None:
        self._server = urlsplit(url)
        self._folder = folder
        self._socket_file = folder / "way-out"
        self.url = f"http://127.0.0.1:{INSIDE_PORT}{self._server.path}"

    async def __aenter__(self) -> Self:
        host, port = self._server.hostname, self._server.port
        self._relay = Relay(lambda: asyncio.open_connection(host, port))
        await self._relay.listen(lambda accept: asyncio.start_unix_server(accept, self._socket_file))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._relay.close()
        self._socket_file.unlink(missing_ok=True)

    async def run(
        self,
        claude: Path,
        *arguments: str,
        environment: Mapping[str, str | None] | None = None,
        settings: Mapping[str, Any] | None = None,
        interrupt: Awaitable[Any] | None = None,
    ) -> Run:
        """Run it to its end, in a home folder of its own.

        Args:
            claude: the binary.
            arguments: its arguments.
            environment: more variables, or None for one that it shall not have. Without any credential among them,
                it gets ANTHROPIC_API_KEY=dummy.
            settings: what its settings.json says.
            interrupt: once this is done, it gets a SIGINT, as from a user who presses Control-C.
        """
        home = self._folder / f"home-{time.monotonic_ns()}"
        (home / ".claude").mkdir(parents=True)
        if settings is not None:
            (home / ".claude" / "settings.json").write_text(json.dumps(settings))
        relay = [sys.executable, "-P", __file__, str(self._socket_file)]
        command = ["unshare", *_UNSHARE, *relay, str(claude), *arguments]
        began = time.monotonic()
        async with _process(command, home, self._environment(home, environment or {}, settings)) as process:
            interrupting = asyncio.create_task(_interrupt(process, interrupt)) if interrupt else None
            out, err = await asyncio.wait_for(process.communicate(), RUN_SECONDS_MAX)
            if interrupting:
                interrupting.cancel()
                await asyncio.gather(interrupting, return_exceptions=True)
        elapsed_s = time.monotonic() - began
        return Run(process.returncode or 0, out.decode(), err.decode(), elapsed_s)

    def _environment(
        self, home: Path, own: Mapping[str, str | None], settings: Mapping[str, Any] | None
    ) -> dict[str, str]:
        credentials = {"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"}
        has_one = credentials & own.keys() or "apiKeyHelper" in (settings or {})
        usual = ENVIRONMENT | {"HOME": str(home), "ANTHROPIC_BASE_URL": self.url}
        usual |= {} if has_one else {"ANTHROPIC_API_KEY": "dummy"}
        return {name: value for name, value in {**usual, **own}.items() if value is not None}


@asynccontextmanager
async def _process(
    command: Sequence[str], home: Path, environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process in a group of its own, nothing of which is left in the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=home,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _interrupt(process: asyncio.subprocess.Process, when: Awaitable[Any]) -> None:
    await when
    process.send_signal(signal.SIGINT)


# ── Passing bytes on ──────────────────────────────────────────────────────────────────────────────────────────────────

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """Passes on what comes to where it leads; an end that goes away is gone for the other end, too."""

    def __init__(self, onward: Callable[[], Awaitable[Streams]]) -> None:
        self._onward = onward
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, start: Callable[[Callable[..., None]], Awaitable[asyncio.Server]]) -> None:
        self._server = await start(self._accept)

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, *near: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._join(near[0], near[1]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: near[1].close())  # one that is cancelled before it begins does nothing itself

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            with suppress(OSError):
                far_reader, far_writer = await self._onward()
                writers.append(far_writer)
                both = [
                    asyncio.create_task(_pump(reader, far_writer)),
                    asyncio.create_task(_pump(far_reader, writer)),
                ]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in both:
                        pump.cancel()
                    await asyncio.gather(*both, return_exceptions=True)
        finally:
            for each in writers:
                each.close()
            for each in writers:
                with suppress(OSError):
                    await each.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


# ── Inside the namespace ──────────────────────────────────────────────────────────────────────────────────────────────


def _bring_loopback_up() -> None:
    """What `ip link set lo up` does, without ip."""
    set_flags, up = 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", b"lo", up))


async def _inside(socket_file: str, *command: str) -> int:
    _bring_loopback_up()
    relay = Relay(lambda: asyncio.open_unix_connection(socket_file))
    await relay.listen(lambda accept: asyncio.start_server(accept, "127.0.0.1", INSIDE_PORT))
    process = await asyncio.create_subprocess_exec(*command)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, process.send_signal, signal.SIGINT)
    code = await process.wait()
    await relay.close()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(asyncio.run(_inside(*sys.argv[1:])))
