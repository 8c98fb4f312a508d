"""What bills cost, from a real server's ledger to checked reports: `python -m benchmarks.billing`.

    python -m benchmarks.billing                                200,000 entries
    python -m benchmarks.billing --entries 10000000 --rounds 1  a quarter of an hour, 3 GB of disk

The server is filled by XADD with the very fields that the scripts write, since booking so many calls one by one would
take longer than all that is measured. It never holds more than 2.5 million of them: they are exported in turns, and
what is exported is trimmed; of this, exporting alone is timed. Each step runs in a process of its own, whose memory is
told with it. Times depend on the machine and on what else it does; the CPU time of the process depends on that less.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import parser_of
from meterlib import Meter, Policy, StoreOptions, Usage
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.verify import verify
from meterlib.billing.export.export import Exporter
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.rater import Prices, Rater
from meterlib.billing.prices.files import claude_book
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.terms import LIST
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.cost import cost_report
from meterlib.billing.reports.evidence import unknown_names
from meterlib.billing.reports.query import Query
from meterlib.billing.reports.usage import usage_report
from meterlib.core.ledger import CallFacts, Outcome, counts_of, digest_of, encode
from meterlib.core.usage import CacheCreation
from meterlib.store.keys import shard_keys
from tests.support.servers import Server, available, start_server

START_MS = 1_790_000_000_000
EPOCH = f"{START_MS - 1000:013d}"
MODELS = ("claude-sonnet-4-5", "claude-haiku-4-5", "claude-opus-4-5", "claude-sonnet-5-5")
TENANTS, KEYS, SESSIONS = 40, 100, 2_000
FILLED_AT_ONCE = 2_000
TURN = 2_500_000
"""Entries that the server holds at most: some 900 MB."""
REPORTS = {
    "usage by tenant": ("usage", ("tenant",)),
    "cost by tenant": ("cost", ("tenant",)),
    "usage by tenant, model, local day": ("usage", ("tenant", "model", "day")),
    "cost by tenant, model, local day": ("cost", ("tenant", "model", "day")),
}
TZ = "Europe/Berlin"
Figures = Mapping[str, float]


def entries(count: int, seed: int = 1) -> Iterator[dict[str, str | bytes]]:
    """The stored fields of settled calls as Claude Code makes them: mostly cache reads, now and then a large write."""
    chance = random.Random(seed)
    sessions = [f"{chance.getrandbits(128):032x}" for _ in range(SESSIONS)]
    now_ms = START_MS
    for _ in range(count):
        now_ms += chance.randrange(40)
        yield _entry(chance, now_ms, chance.choice(sessions))


def _entry(chance: random.Random, now_ms: int, session: str) -> dict[str, str | bytes]:
    attributes = {"provider": "anthropic", "model": chance.choice(MODELS), "key": f"key-{chance.randrange(KEYS)}"}
    call = CallFacts(tenant=f"tenant-{chance.randrange(TENANTS)}", attributes=attributes | {"session": session})
    uncached, written = chance.randrange(5, 4_000), chance.choice((0, 0, chance.randrange(1_000, 20_000)))
    usage = Usage(
        input_tokens=uncached,
        cache_creation_input_tokens=written,
        cache_read_input_tokens=chance.randrange(150_000),
        output_tokens=chance.randrange(1, 3_000),
        cache_creation=CacheCreation(ephemeral_5m_input_tokens=written, ephemeral_1h_input_tokens=0),
        service_tier="standard",
    )
    facts = {"request_id": f"req_011C{chance.getrandbits(96):024x}"}
    outcome = encode(Outcome(usage=counts_of(usage), facts=facts))
    return {
        "kind": "settled",
        "after": "",
        "id": f"{chance.getrandbits(128):032x}",
        "reserved_at": str(now_ms - chance.randrange(500, 20_000)),
        "booked_at": str(now_ms),
        "call": encode(call),
        "estimate": encode(Usage(input_tokens=uncached + chance.randrange(50), output_tokens=4_096)),
        "outcome": outcome,
        "digest": digest_of(outcome),
        "epoch": EPOCH,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = parser_of("billing", __doc__, servers=False)
    parser.add_argument("--entries", type=int, help="how many (200,000; 20,000 with --quick)")
    parser.add_argument("--rounds", type=int, help="runs of each step; the best one counts (3; 1 with --quick)")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    options = parser.parse_args(arguments)
    options.entries = options.entries or (20_000 if options.quick else 200_000)
    options.rounds = options.rounds or (1 if options.quick else 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = _measured(folder, options.entries, options.rounds)
    if options.json:
        print(json.dumps({"entries": options.entries, "steps": found}, indent=2))
        return 0
    print(f"{options.entries:,} entries, best of {options.rounds}")
    for step, figures in found.items():
        print(f"{step:34}", *(f"{key} {value:,}" for key, value in figures.items()), sep="  ")
    return 0


def _measured(folder: Path, count: int, rounds: int) -> dict[str, Figures]:
    """What each step took, by its name."""
    archives = [folder / str(at) for at in range(rounds)]
    found = {"export": _best(_exports(folder, count, archives))}
    found["rate"] = _best([_step("rating", _rated, archive) for archive in archives])
    found["verify entries"] = _best([_step("verifying", _verified, archives[0]) for _ in range(rounds)])
    for name in REPORTS:
        found[name] = _best([_step(f"report of {name}", _reported, archives[0], name) for _ in range(rounds)])
    _tell("")
    return found


def _exports(folder: Path, count: int, archives: Sequence[Path]) -> list[Figures]:
    """What the export into each archive took, in turns."""
    turns: list[list[Figures]] = [[] for _ in archives]
    ledger, more = shard_keys("meterlib", 0)[3], enumerate(entries(count), 1)
    with _server(folder) as server, server.client() as client:
        for first in range(1, count + 1, TURN):
            end = min(first + TURN - 1, count)
            _fill(client, ledger, islice(more, TURN), count)
            for archive, figures in zip(archives, turns, strict=True):
                figures.append(_step(f"exporting up to {end:,} of {count:,}", _exported, archive, server.url))
            client.xtrim(ledger, minid=f"{end}-0", approximate=False)  # by the last one an export knows where it is
    return [_of_turns(figures) for figures in turns]


def _of_turns(turns: Sequence[Figures]) -> Figures:
    exported, took_s, used_s = (sum(turn[name] for turn in turns) for name in ("entries", "seconds", "cpu_s"))
    rss_mb = max(turn["rss_mb_max"] for turn in turns)
    return {**_figures(int(exported), took_s, used_s), "bytes_each": turns[-1]["bytes_each"], "rss_mb_max": rss_mb}


def _tell(doing: str) -> None:
    """Say what is being done, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{doing}", end="", file=sys.stderr, flush=True)


def _step(doing: str, step: Callable[..., Figures], *arguments: object) -> Figures:
    _tell(doing)
    return _alone(step, *arguments)


def _best(runs: Sequence[Figures]) -> Figures:
    return min(runs, key=lambda figures: figures["seconds"])


def _alone(step: Callable[..., Figures], *arguments: object) -> Figures:
    """What a step took in a process of its own, the memory that it took at most included."""
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe()
    process = context.Process(target=_run, args=(theirs, step, arguments))
    process.start()
    theirs.close()
    try:
        figures: Figures = ours.recv()
    except EOFError:
        raise SystemExit(f"{step.__name__} failed") from None
    process.join()
    return figures


def _run(pipe: Any, step: Callable[..., Figures], arguments: Sequence[Any]) -> None:
    pipe.send({**step(*arguments), "rss_mb_max": _rss_mb()})


@contextmanager
def _server(folder: Path) -> Iterator[Server]:
    """A server of its own."""
    kind = "valkey" if available("valkey") is None else "redis"
    with start_server(folder / "server", kind) as server:
        yield server


def _fill(client: Any, ledger: str, more: Iterator[tuple[int, Any]], count: int) -> None:
    """Append entries to the ledger of one shard."""
    while part := list(islice(more, FILLED_AT_ONCE)):
        with client.pipeline(transaction=False) as pipeline:
            for n, fields in part:
                pipeline.xadd(ledger, fields, id=f"{n}-0")
            pipeline.execute()
        _tell(f"filling the server: {part[-1][0]:,} of {count:,}")


def _exported(path: Path, url: str) -> Figures:
    options = StoreOptions(shards=1)
    with Meter.connect(url, Policy(), options=options, sweep_interval_ms=0) as meter, Archive(path) as archive:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        with Exporter(archive, meter._driver.run) as exporter:
            exported = exporter.export(0)
        took_s, used_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        if exported.problem is not None:
            raise exported.problem
        segments = archive.segments(0)
        size = sum(archive.file(segment).stat().st_size for segment in segments)
    each = round(size / segments[-1].last, 1)
    return {"entries": exported.entries, "seconds": took_s, "cpu_s": used_s, "bytes_each": each}


def _rated(path: Path) -> Figures:
    prices = Prices(books=PriceBooks(claude_book()), terms_of=lambda tenant: LIST)
    with Archive(path) as archive:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        with Rater(archive, prices) as rater:
            rated = rater.rate(0)
        took_s, used_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        postings = Postings(archive)
        size = sum(file.stat().st_size for file in postings.files())
        ((rows,),) = archive.database().execute(f"SELECT count(*) FROM ({postings.rows_sql()})").fetchall()
    figures = _figures(rated.entries, took_s, used_s)
    return {**figures, "rows_per_second": round(rows / took_s), "bytes_each": round(size / rated.entries, 1)}


def _verified(path: Path) -> Figures:
    with Archive(path) as archive:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        (verdict,) = verify(archive)
        return _figures(verdict.entries, time.perf_counter() - began_s, time.process_time() - cpu_s)


def _reported(path: Path, name: str) -> Figures:
    """A report from the opening of the archive to its last row."""
    kind, by = REPORTS[name]
    query = Query(by=by, tz=TZ)
    with Archive(path) as archive:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        postings = Postings(archive)
        with Reader(postings) as reader:
            cost = kind == "cost"
            answer = cost_report(reader, query) if cost else usage_report(reader, query, unknown_names(postings))
            rows = len(list(answer.rows()))
        took_s, used_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return {"seconds": round(took_s, 2), "cpu_s": round(used_s, 2), "rows": rows}


def _figures(count: int, took_s: float, cpu_s: float) -> dict[str, float]:
    return {
        "per_second": round(count / took_s),
        "seconds": round(took_s, 2),
        "cpu_us_each": round(cpu_s / count * 1e6, 1),
    }


def _rss_mb() -> int:
    most: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) // (1024 if sys.platform == "linux" else 1 << 20)


if __name__ == "__main__":
    sys.exit(main())
