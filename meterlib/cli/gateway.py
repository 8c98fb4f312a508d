"""`meterlib gateway`: serve until told to stop; tenants and limits are read anew when the file changes."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from meterlib.cli.exits import OK
from meterlib.cli.options import add_config
from meterlib.config import FILE_NAME, Config
from meterlib.errors import MeterError, PolicyError, UsageError
from meterlib.store.telling import Log

if TYPE_CHECKING:
    from meterlib.gateway.app import Gateway

HELP = """\
Serve the Claude API within limits, metered. Without any configuration each caller's
own provider key is passed on, nothing is limited, and everything is metered: set
ANTHROPIC_BASE_URL to the address shown, and see with `meterlib report` what was used.

With meterlib.toml: tenants with tokens (`meterlib token new`), limits, models,
provider keys. Tenants and limits are read anew on SIGHUP or when the file changes.
SIGTERM or Ctrl-C lets open answers go on for a while (shutdown_ms); a second one
settles them as they stand.
---
examples:
  meterlib gateway                               on 127.0.0.1:8787, to api.anthropic.com
  meterlib gateway --listen 0.0.0.0:80 --config /etc/meterlib.toml
  ANTHROPIC_BASE_URL=http://127.0.0.1:8787 claude
  meterlib report --by tenant,model

exit codes: 0 stopped as told; 1 could not start; 2 wrong usage or configuration
"""
WATCH_S = 1.0
COLLECT_AFTER = 20_000
"""Objects that may have come to be since the last look for cycles among the young ones."""

log = Log("meterlib.gateway")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_config(parser)
    parser.add_argument("--listen", metavar="HOST:PORT", help="where to listen (port 0 finds a free one)")
    parser.add_argument("--upstream", metavar="URL", help="the provider's base URL")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise UsageError("the gateway needs aiohttp: pip install 'meterlib[gateway]'") from None
    _loop_runner()(_serve(arguments))
    return OK


def _loop_runner() -> Any:
    """uvloop's, where it is installed: it carries about a third more."""
    with suppress(ImportError):
        import uvloop

        return uvloop.run
    return asyncio.run


async def _serve(arguments: argparse.Namespace) -> None:
    from meterlib.gateway.assembly import gateway_for
    from meterlib.gateway.server import Server

    file = Path(arguments.config or FILE_NAME)
    seen = _stamp(file)
    config = _config(arguments)
    book = _stamp_of_book(config)
    stopping, changed = asyncio.Event(), asyncio.Event()
    async with Server(gateway_for(config)) as server:
        _on_signals(server.gateway, stopping, changed)
        collect_seldom()
        print(f"meterlib gateway at {server.url}, to {config.gateway.upstream}", file=sys.stderr)
        print(f"  export ANTHROPIC_BASE_URL={server.url}", file=sys.stderr, flush=True)
        reloading = _Reloading(arguments, file, (seen, book), config, server.gateway)
        watching = asyncio.create_task(reloading.watch(changed))
        looking = asyncio.create_task(_look_at_store(server.gateway, config))
        await stopping.wait()
        watching.cancel()
        looking.cancel()
        if server.gateway.open_calls:
            print(f"finishing {server.gateway.open_calls} open calls; again to stop at once", file=sys.stderr)


def collect_seldom() -> None:
    """Spare the garbage collector what is there for good, and let it look for cycles less often.

    A stream makes some thousands of objects, nearly none of them in cycles; looking for those as often as Python does
    by itself takes a tenth of the gateway's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


async def _look_at_store(gateway: Gateway, config: Config) -> None:
    """Say so at once if calls could not be decided about, and not only when the first one comes."""
    try:
        await gateway.meter.head(0)
    except MeterError as error:
        meanwhile = "are refused" if config.store.when_down == "deny" else "pass unmetered"
        log.warning("store.unreachable", error=str(error), meanwhile=f"calls {meanwhile}", setting="store.url")


def _config(arguments: argparse.Namespace) -> Config:
    config = Config.find(arguments.config)
    given = {"listen": arguments.listen, "upstream": arguments.upstream}
    gateway = replace(config.gateway, **{name: value for name, value in given.items() if value is not None})
    return replace(config, gateway=gateway)


def _on_signals(gateway: Gateway, stopping: asyncio.Event, changed: asyncio.Event) -> None:
    def stop() -> None:
        if stopping.is_set():
            gateway.stop_now()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, changed.set)


Stamp = tuple[int, int, int] | None


def _stamp(file: Path) -> Stamp:
    """What is another when the file is; None if there is no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _stamp_of_book(config: Config) -> Stamp:
    return _stamp(Path(config.billing.book)) if config.billing.book else None


class _Reloading:
    """Reads tenants, limits and prices anew; a file that is wrong, or gone, changes nothing."""

    def __init__(
        self, arguments: argparse.Namespace, file: Path, seen: tuple[Stamp, Stamp], config: Config, gateway: Gateway
    ) -> None:
        self._arguments = arguments
        self._file = file
        self._seen = seen
        self._has_file = seen[0] is not None  # without one, the gateway would be open to anyone, and without limits
        self._config = config
        self._gateway = gateway

    async def watch(self, changed: asyncio.Event) -> None:
        """On SIGHUP, and when the file is another."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await changed.wait()
            now = (_stamp(self._file), _stamp_of_book(self._config))
            if changed.is_set() or now != self._seen:
                changed.clear()
                self._reload(now)

    def _reload(self, now: tuple[Stamp, Stamp]) -> None:
        from meterlib.gateway.assembly import callers_for, spending_for

        self._seen = now
        try:
            if now[0] is None and self._has_file:
                raise PolicyError("", f"{self._file} is gone")
            config = _config(self._arguments)
            self._has_file = now[0] is not None
            self._gateway.reload(config.gateway, callers_for(config), config.policy, spending_for(config))
        except (MeterError, OSError) as error:
            log.error("configuration.refused", error=str(error), kept="the settings from before")
            return
        if config.store != self._config.store:
            log.warning("setting.needs_restart", setting="store")
        self._config = config
        self._seen = (now[0], _stamp_of_book(config))
