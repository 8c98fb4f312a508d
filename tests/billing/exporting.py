"""A small ledger and an archive beside it, for tests of the export and of what reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakeredis

from meterlib import LedgerEntry, Limit, Meter, Policy, StoreOptions, Usage
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.verify import verify
from meterlib.billing.export.export import Accepted, Exported, Exporter
from meterlib.core.usage import CacheCreation, Iteration, ServerToolUse
from meterlib.store.keys import shard_keys
from meterlib.testing import Clock

NOW_MS = 1_600_000_000_000
POLICY = Policy(limits=(Limit(name="hour", unit="input_tokens", quota=10**9, window="1h"),))
LEDGER = shard_keys("meterlib", 0)[3]
BLOCK = 4
"""Entries of a segment: few, so that little is needed to fill some."""

SETTINGS = """\
[store]
url = "{url}"
shards = 1

[billing]
archive = "archive"
segment_entries = {block}
"""


class Books:
    """A store of one shard with a clock of its own, and an archive that is opened anew for each export."""

    def __init__(self, folder: Path, client: Any = None, url: str | None = None, block: int = BLOCK) -> None:
        self.clock = Clock(NOW_MS)
        self.client: Any = client or fakeredis.FakeRedis()
        self.meter = Meter(url or self.client, POLICY, options=StoreOptions(shards=1), clock=self.clock)
        self.path = folder / "archive"
        self.block = block
        self._booked = 0
        self.settings = folder / "meterlib.toml"
        if url:
            self.settings.write_text(SETTINGS.format(url=url, block=block))

    def run(self, flow: Any) -> Any:
        """Run a flow against the store."""
        return self.meter._driver.run(flow)

    def archive(self) -> Archive:
        """The archive, opened anew."""
        return Archive(self.path, self.block)

    def book(self, count: int = 1) -> None:
        """Append entries, each unlike the others."""
        for _ in range(count):
            self._booked += 1
            self.clock.advance(ms=10)
            usage = Usage(input_tokens=self._booked, output_tokens=7)
            self.meter.record("acme", {"model": "opus"}, usage, record_id=f"r{self._booked}")

    def book_all_kinds(self) -> None:
        """Append an entry of every kind."""
        meter, attributes = self.meter, {"provider": "anthropic", "model": "claude-opus-4-5", "session": "ü≠"}
        held = meter.reserve("acme", attributes, Usage(input_tokens=9))
        entry = held.settle(
            Usage(
                input_tokens=3,
                cache_creation_input_tokens=5,
                cache_creation=CacheCreation(ephemeral_5m_input_tokens=2, ephemeral_1h_input_tokens=3),
                server_tool_use=ServerToolUse(web_search_requests=1),
                iterations=(Iteration(type="compaction", model="haiku", input_tokens=8, output_tokens=1),),
                amounts={"cost_nanousd": 12},
                service_tier="standard",
            ),
            facts={"request_id": "req_1"},
        )
        meter.reserve("acme", attributes).cancel()
        late = meter.reserve("acme", attributes, Usage(input_tokens=5), lease_ms=1000)
        self.clock.advance(ms=2000)
        meter.sweep()
        meter.settle("acme", late.id, Usage(output_tokens=9), quality="partial")
        meter.record("globex", {}, Usage(), funding="own")
        meter.adjust(entry, {"input_tokens": -3, "amounts": {"cost_nanousd": -2}}, "double", actor="ann")

    def export(self, accepted: Accepted | None = None) -> Exported:
        """One export of the shard."""
        with self.archive() as archive, Exporter(archive, self.run, accepted=accepted) as exporter:
            return exporter.export(0)

    def close(self) -> None:
        """Leave the store."""
        self.meter.close()

    def booked(self) -> list[LedgerEntry]:
        """What the ledger has."""
        return list(self.meter.ledger(0))

    def archived(self) -> list[LedgerEntry]:
        """What the archive has; its files are as they should be."""
        with self.archive() as archive:
            assert [] == [problem for found in verify(archive) for problem in found.problems]
            return list(archive.entries(0))

    def files(self) -> dict[str, bytes]:
        """Every file of the archive, temporary ones too."""
        return {
            str(file.relative_to(self.path)): file.read_bytes()
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
        }

    def names(self) -> list[tuple[int, int]]:
        """First and last number of every segment's file."""
        with self.archive() as archive:
            return [(segment.first, segment.last) for segment in archive.listed(0)]

    def rewrite(self, n: int, change: Callable[[dict[bytes, bytes]], None]) -> None:
        """Change an entry in the store, as nobody should; those behind it are written anew."""
        entries: Any = self.client.xrange(LEDGER)
        self.client.delete(LEDGER)
        for stream_id, fields in entries:
            if stream_id == b"%d-0" % n:
                change(fields)
            self.client.xadd(LEDGER, fields, id=stream_id)
