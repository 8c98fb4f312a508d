"""`meterlib doctor`: whether server, store and limits are fit for service."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import msgspec

from meterlib.cli import doctor_limits, doctor_server, doctor_tokens
from meterlib.cli.doctor_findings import Finding, failure, ok, warning
from meterlib.cli.exits import FAILURE, OK
from meterlib.cli.options import add_config, add_json
from meterlib.cli.store import Store, check_exists, no_answer, settings_file
from meterlib.cli.times import span_text, terminal_width
from meterlib.config import Config
from meterlib.errors import EmbeddedError, MeterError, StoreCorrupt, StoreUnavailable
from meterlib.store.commands import ShardHead
from meterlib.store.embedded import parse_embedded_url
from meterlib.store.faults import FAILURES
from meterlib.store.journal import Journal

HELP = """\
Examine a store from end to end, and say what to do about whatever is not as it
should be: the server's kind and version, eviction policy, memory, what a crash
could lose, the clocks, the layout, the ledger of each shard, reservations that
nobody swept, settlements that wait in the journal, and tokens that expire soon.

Each configured limit is proven able to deny: on the real server, under a prefix of
its own that is deleted afterwards, its quota is filled, and one more must be denied.
Nothing else changes, and an embedded store that does not exist yet is told, and not
created.
---
examples:
  meterlib doctor
  meterlib doctor --json | jq '.findings[] | select(.status != "ok")'

exit codes: 0 no failure (warnings there may be); 1 a failure was found;
2 wrong usage or configuration
"""
_ROUNDS = 5
_COLORS = {"ok": "32", "warning": "33", "failure": "31"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib doctor`."""
    add_json(parser)
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; returns the exit code."""
    config = Config.find(arguments.config)
    check_exists(config)
    with closing(Store(config)) as store:
        findings = list(_findings(store, arguments.config))
    counts = {status: sum(finding.status == status for finding in findings) for status in _COLORS}
    if arguments.json:
        document = {"healthy": not counts["failure"], "counts": counts, "findings": msgspec.to_builtins(findings)}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _print(findings)
        print()
        print(f"ok: {counts['ok']}, warnings: {counts['warning']}, failures: {counts['failure']}")
    return FAILURE if counts["failure"] else OK


def _findings(store: Store, file: str | None) -> Iterator[Finding]:
    yield _configuration(store.config, file)
    yield from doctor_tokens.examine(store.config, time.time())
    try:
        store.reach()
        store.head(0)
    except EmbeddedError as error:
        yield failure("store", str(error), "see the server's log, which is in that folder")
        return
    except StoreUnavailable as error:
        yield failure("store", no_answer(error, store.config, file), "does a server run there?")
        return
    except MeterError as error:
        yield failure("store", str(error), "is [store] url right, user and password too?")
        return
    yield _place(store.config.store.url)
    now_ms: int | None = None
    if store.client is not None:
        try:
            nodes = doctor_server.nodes_of(store.client)
            for node in nodes:
                prefix = f"{node.name} " if len(nodes) > 1 else ""
                for finding in doctor_server.examine(node, cluster=hasattr(store.client, "get_primaries")):
                    yield msgspec.structs.replace(finding, check=prefix + finding.check)
            now_ms = nodes[0].clock().server_ms
        except FAILURES as error:
            yield failure("server", f"{type(error).__name__}: {error}", "is the server running?")
            return
    yield from _shards(store, now_ms)
    yield from _journal(store.config)
    yield from doctor_limits.prove(store.config, now_ms or 1_790_000_000_000)


def _configuration(config: Config, file: str | None) -> Finding:
    found = settings_file(file) or "no file, so the defaults"
    limits, tenants = len(config.policy.limits), len(config.tenant)
    found += f": {limits} limits, {tenants} tenants with settings of their own"
    if not limits:
        return warning("settings", found, "without a limit every call is let through; add [[limit]] or preset = …")
    return ok("settings", found)


def _place(url: str) -> Finding:
    scheme = url.partition("://")[0]
    if scheme == "memory":
        return warning("store", "memory://: each process has its own, gone when it ends", "use it in tests only")
    if scheme == "embedded":
        return ok("store", f"embedded in {parse_embedded_url(url)}")
    return ok("store", f"reached by {scheme}://")


def _journal(config: Config) -> Iterator[Finding]:
    journal = config.journal
    if journal is None:
        return
    try:
        waiting = len(Journal(journal).waiting())
    except (OSError, msgspec.MsgspecError) as error:
        yield failure("journal", f"{journal} cannot be read: {error}", "see who else writes to this file")
        return
    if waiting:
        found = f"{waiting} settlements wait in {journal}; they are not in the ledger yet"
        yield warning("journal", found, "a running meter with this journal replays them; is there one?")
    else:
        yield ok("journal", f"nothing waits in {journal}")


# ── Each shard ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _shards(store: Store, now_ms: int | None) -> Iterator[Finding]:
    found: list[Finding] = []
    entries = open_reservations = used = 0
    for shard in range(store.shards):
        try:
            shard_ms = store.clock_ms(shard)
            earlier, head = _two_heads(store, shard)
            found += _shard(store, shard, earlier, head)
            found += _time(store, shard, shard_ms, now_ms)
        except StoreCorrupt as error:
            yield failure("layout", str(error))
            return
        except (MeterError, *FAILURES) as error:
            found.append(failure(f"shard {shard}", str(error)))
            continue
        entries += head.ledger_length
        open_reservations += head.open_reservations
        used += head.last_number > 0 or head.open_reservations > 0
    if not any(finding.status == "failure" for finding in found):
        text = f"{store.shards} shards, {used} in use: {entries:,} entries, none missing"
        yield ok("ledger", f"{text}; reservations open: {open_reservations:,}")
    yield from found


def _two_heads(store: Store, shard: int) -> tuple[ShardHead, ShardHead]:
    """A shard's numbers twice, the same if it can be found at rest: each is put together from several answers."""
    head = store.head(shard)
    for _ in range(_ROUNDS):
        earlier, head = head, store.head(shard)
        if earlier == head:
            break
    return earlier, head


def _shard(store: Store, shard: int, earlier: ShardHead, head: ShardHead) -> Iterator[Finding]:
    """Whether state and ledger agree. The shard may be growing: what one knew earlier, the other must know by now."""
    check = f"shard {shard}"
    if earlier.last_number > head.ledger_last:
        found = f"its state counts {earlier.last_number} entries, but its ledger ends at {head.ledger_last}"
        yield failure(check, found, "the ledger lost its tail: restore it, or tell billing which entries are missing")
    elif head.last_number < earlier.ledger_last:
        found = f"its ledger ends at {earlier.ledger_last}, but its state counts {head.last_number} entries"
        yield failure(check, found, "the state is older than the ledger: nothing can be booked; restore both together")
    missing = head.ledger_last - head.ledger_first + 1 - head.ledger_length if head.ledger_length else 0
    if missing > 0:
        found = f"{missing} entries are missing between {head.ledger_first} and {head.ledger_last}"
        yield failure(check, found, "somebody deleted them; meterlib report says which")
    if head.ledger_first > 1:
        found = f"its ledger begins at {head.ledger_first}: the entries before were removed"
        yield warning(check, found, "fine if they were exported first")


def _time(store: Store, shard: int, shard_ms: int, now_ms: int | None) -> Iterator[Finding]:
    check = f"shard {shard}"
    if now_ms is not None and shard_ms > now_ms + doctor_server.CLOCK_DIFFERENCE_MS_MAX:
        found = f"its clock is {span_text(shard_ms - now_ms)} ahead of the server's, which was set back"
        yield warning(check, found, "its time runs at half speed until the server has caught up; synchronise it (NTP)")
    if store.client is not None:
        late = doctor_server.overdue(store.client, store.config.store.prefix, shard, shard_ms)
        if late:
            found = f"{late} reservations have been overdue for a minute or longer"
            yield warning(check, found, "no meter sweeps this store: keep one running, or call meter.sweep()")


# ── Printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _print(findings: Sequence[Finding]) -> None:
    indent = 9
    for finding in findings:
        status = f"{finding.status:<{indent}}"
        text = textwrap.wrap(f"{finding.check}: {finding.found}", terminal_width() - indent, break_on_hyphens=False)
        advice = textwrap.wrap(finding.advice, terminal_width() - indent - 2, break_on_hyphens=False)
        print(_colored(status, _COLORS[finding.status]) + text[0])
        for line in text[1:]:
            print(" " * indent + line)
        for at, line in enumerate(advice):
            print(" " * indent + ("> " if at == 0 else "  ") + line)


def _colored(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text
