"""The law of the books: whatever is called, killed, lost, trimmed and forked, what is archived is what a model counted.

The model is plain Python and shares nothing with scripts, twins or export: it says of each verb which entries it books,
and of each loss which of them nobody will see again.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterlib import LedgerEntry, Limit, Meter, Policy, StoreOptions, Usage
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.sinks import Sink
from meterlib.billing.archive.verify import verify
from meterlib.billing.export.export import Export
from meterlib.billing.export.fork import fork, loss_of
from meterlib.billing.export.postgres import Postgres
from meterlib.billing.export.trim import trim
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.rater import Prices, Rater
from meterlib.billing.postings.verify_rated import marks_of, verify_rated
from meterlib.billing.prices.files import parse_book
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.terms import LIST
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.cost import cost_report
from meterlib.billing.reports.query import Query
from meterlib.billing.reports.usage import usage_report
from meterlib.errors import ReservationEnded
from meterlib.store import flows
from meterlib.testing import Clock
from tests.billing import test_export, test_postgres
from tests.billing.money import BOOK
from tests.conftest import soak_seconds
from tests.support.postgres import PostgresServer
from tests.support.servers import Server

SHARDS = 2
BLOCK = 4
TENANTS = ("acme", "globex", "initech", "umbrella")
POLICY = Policy(limits=(Limit(name="hour", unit="input_tokens", quota=10**9, window="1h"),))
CALL = {"provider": "anthropic", "model": "plain"}
PRICE = Decimal(3) / 1_000_000
"""Dollars for an input token of the model `plain`; its output costs five times that."""
LEASE_MS = 60_000
RESERVATIONS = 12
"""Few, so that verbs meet on one, again and again."""
KILLED = (test_export.Killed, test_postgres.Killed)


class Fact(NamedTuple):
    """An entry, as far as the model knows it."""

    kind: str
    tenant: str
    reservation_id: str
    tokens: int


def fact_of(entry: LedgerEntry) -> Fact:
    """What an entry says. Each has as many output tokens as input tokens, but for none at all."""
    tokens: Any = entry.usage.get("input_tokens", 0)
    assert tokens == entry.usage.get("output_tokens", 0)
    return Fact(entry.kind, entry.tenant, entry.reservation_id, tokens)


class Model:
    """What a store should know: which reservations are open, and which have ended how."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.ended: dict[str, str] = {}

    def copy(self) -> Model:
        """As it is now."""
        other = Model()
        other.open, other.ended = dict(self.open), dict(self.ended)
        return other

    def reserve(self, number: str, until_ms: int) -> None:
        """Open one, which stays as it is if it is open already."""
        self.open.setdefault(number, until_ms)

    def settle(self, number: str) -> str | None:
        """The kind of the entry; None if it is told already."""
        if self.open.pop(number, None) is not None:
            self.ended[number] = "settled"
            return "settled"
        if self.ended.get(number) in ("settled", "late"):
            return None
        self.ended[number] = "late"  # the call was cancelled or expired, or the store has lost it
        return "late"

    def cancel(self, number: str) -> str | None:
        """The same; one that is not open stays as it is."""
        if self.open.pop(number, None) is None:
            return None
        self.ended[number] = "cancelled"
        return "cancelled"

    def lapse(self, now_ms: int) -> list[str]:
        """Those that expire."""
        over = [number for number, until_ms in self.open.items() if until_ms <= now_ms]
        for number in over:
            del self.open[number]
            self.ended[number] = "expired"
        return over


class Books:
    """A store of two shards beside its model, an archive, and perhaps PostgreSQL."""

    def __init__(self, folder: Path, client: Any, sink: Callable[[], Postgres] | None) -> None:
        self.client, self.path, self._sink = client, folder / "archive", sink
        self.clock = Clock(1_791_600_000_000)
        self.meter = Meter(client, POLICY, options=StoreOptions(shards=SHARDS), clock=self.clock)
        self.run = self.meter._driver.run
        self.shard_of = self.meter._context.shard_of
        self.model = Model()
        self.booked: list[list[LedgerEntry]] = [[] for _ in range(SHARDS)]
        self.seen = [0] * SHARDS
        self.exported: list[list[LedgerEntry]] = [[] for _ in range(SHARDS)]
        self.count = 0
        self.remember()

    # ── Verbs ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def act(self, verb: str, which: int, tokens: int) -> None:
        """Do it, and hold what the ledgers say against what the model expects."""
        self.clock.advance(ms=7)
        opened = sorted(self.model.open)
        if verb in ("settle", "cancel") and opened and tokens > 2:  # else of any call, which may have ended long ago
            which = int(opened[which % len(opened)][1:])
        number, tenant = f"r{which}", TENANTS[which % len(TENANTS)]
        usage = Usage(input_tokens=100 + which, output_tokens=100 + which)
        told: list[Fact] = []
        if verb == "reserve":
            if number in self.model.ended:
                with pytest.raises(ReservationEnded):
                    self.meter.reserve(tenant, CALL, usage, reservation_id=number, lease_ms=LEASE_MS)
            else:
                self.meter.reserve(tenant, CALL, usage, reservation_id=number, lease_ms=LEASE_MS)
                self.model.reserve(number, self.clock.now_ms + LEASE_MS)
        elif verb == "settle":
            for _ in range(1 + tokens % 2):  # a client that repeats itself books nothing more
                self.meter.settle(tenant, number, usage, attributes=CALL)
            kind = self.model.settle(number)
            told = [Fact(kind, tenant, number, 100 + which)] if kind else []
        elif verb == "cancel" and number in self.model.open:
            self.meter.cancel(tenant, number)
            kind = self.model.cancel(number)
            told = [Fact(str(kind), tenant, number, 0)]
        elif verb == "lapse":
            self.clock.advance(ms=LEASE_MS)
            told = self._lapsed()
        elif verb == "record":
            self.count += 1
            recorded = Usage(input_tokens=tokens, output_tokens=tokens)
            self.meter.record(tenant, CALL, recorded, record_id=f"own-{self.count}")
            told = [Fact("recorded", tenant, f"own-{self.count}", tokens)]
        elif verb == "adjust":
            told = self._adjust(tenant, tokens)
        assert Counter(told) == Counter(self._new()), verb

    def _lapsed(self) -> list[Fact]:
        """What expires now."""
        self.meter.sweep()
        over = self.model.lapse(self.clock.now_ms)
        return [Fact("expired", TENANTS[int(one[1:]) % len(TENANTS)], one, 0) for one in over]

    def _adjust(self, tenant: str, tokens: int) -> list[Fact]:
        entries = [one for one in self.meter.ledger(self.shard_of(tenant)) if one.kind in ("settled", "recorded")]
        if not entries:
            return []
        entry = entries[tokens % len(entries)]
        self.count += 1
        difference = {"input_tokens": -tokens, "output_tokens": -tokens}
        self.meter.adjust(entry, difference, "counted twice", adjust_id=f"own-{self.count}")
        return [Fact("adjusted", entry.tenant, f"own-{self.count}", -tokens)]

    def _new(self) -> Iterator[Fact]:
        """What the ledgers have that they had not before."""
        for shard in range(SHARDS):
            for entry in self.meter.ledger(shard, self.seen[shard]):
                assert entry.n == self.seen[shard] + 1
                self.seen[shard] = entry.n
                self.booked[shard].append(entry)
                yield fact_of(entry)

    # ── Losses ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def remember(self) -> None:
        """The moment to which a loss goes back."""
        kept = {key: self.client.dump(key) for key in self.client.scan_iter()}
        self._kept = (kept, self.model.copy(), [list(one) for one in self.booked], list(self.seen))

    def lose(self) -> None:
        """All that the store was told since that moment."""
        self.clock.advance(ms=7)
        kept, model, booked, seen = self._kept
        self.client.flushall()
        for key, value in kept.items():
            self.client.restore(key, 0, value)
        self.model, self.booked, self.seen = model.copy(), [list(one) for one in booked], list(seen)
        assert Counter(self._lapsed()) == Counter(self._new())  # time went on meanwhile

    # ── Export ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def sinks(self) -> Iterator[list[Sink[Any]]]:
        """Opened anew, as by a new process."""
        with Archive(self.path, BLOCK) as archive:
            sinks: list[Sink[Any]] = [archive]
            if self._sink is not None:
                sinks.append(self._sink())
                sinks[1].prepare()
            try:
                yield sinks
            finally:
                for sink in sinks[1:]:
                    sink.close()

    def export(self) -> None:
        """Export, with forks if they are needed; then everything that the stores have is archived."""
        with self.sinks() as sinks:
            for shard in range(SHARDS):
                if (loss := loss_of(sinks, self.run, shard)) is not None:
                    gone = {one.reservation_id for one in self._lost(shard)}
                    came = {one.reservation_id for one in self._unexported(shard)}
                    assert gone & came == set(loss.twice), (gone, came, loss.twice)
                    begun = fork(loss, self.run)
                    self.seen[shard] = begun.first + begun.moved - 1
            with Export(sinks, self.run) as export:
                results = [one for shard in range(SHARDS) for one in export.export(shard)]
        assert [None] * len(results) == [one.problem for one in results]
        for shard in range(SHARDS):
            self.exported[shard] += self._unexported(shard)
        self.check_archive()

    def _lost(self, shard: int) -> list[LedgerEntry]:
        """What the last loss took: all behind the last exported entry that the store still has, which may follow
        entries that an earlier loss took."""
        kept = {identity(entry) for entry in self.booked[shard]}
        exported = self.exported[shard]
        return exported[max((at for at, one in enumerate(exported, 1) if identity(one) in kept), default=0) :]

    def _unexported(self, shard: int) -> list[LedgerEntry]:
        known = {identity(entry) for entry in self.exported[shard]}
        return [entry for entry in self.booked[shard] if identity(entry) not in known]

    def crash(self, step: str) -> None:
        """An export dies at a step; what is archived by then is the beginning of what would have been."""
        patch = test_postgres.dies if step in ("begin", "copy", "commit") else test_export.dies
        with pytest.MonkeyPatch.context() as patched, suppress(*KILLED), self.sinks() as sinks:
            patch(patched, step)
            with Export(sinks, self.run) as export:
                for shard in range(SHARDS):
                    export.export(shard)
        for shard in range(SHARDS):
            archived = self.archived(shard)
            wanted = self.exported[shard] + self._unexported(shard)
            assert [identity(one) for one in archived] == [identity(one) for one in wanted[: len(archived)]]
            self.exported[shard] = wanted[: len(archived)]

    def archived(self, shard: int) -> list[LedgerEntry]:
        """What the archive has of a shard."""
        with Archive(self.path, BLOCK) as archive:
            return list(archive.entries(shard)) if shard in archive.shards() else []

    def check_archive(self) -> None:
        """Every entry that was ever exported is archived once, in order, and nothing else is."""
        for shard in range(SHARDS):
            archived = self.archived(shard)
            assert [identity(one) for one in archived] == [identity(one) for one in self.exported[shard]]
            numbers = [one.n for one in archived]
            assert numbers == sorted(set(numbers))

    def trim(self) -> None:
        """Remove from the store what all sinks have; not before a loss was looked at."""
        with self.sinks() as sinks:
            for shard in range(SHARDS):
                if loss_of(sinks, self.run, shard) is None:
                    trim(sinks, self.run, shard, below=2**53 - 1, keep=1)

    def compact(self) -> None:
        """Join files."""
        with Archive(self.path, BLOCK) as archive:
            for shard in archive.shards():
                archive.compact(shard, pieces_max=1)

    def rate(self) -> None:
        """Rate what is archived."""
        prices = Prices(books=PriceBooks(parse_book(BOOK)), terms_of=lambda tenant: LIST)
        with Archive(self.path, BLOCK) as archive, Rater(archive, prices) as rater:
            for shard in archive.shards():
                rater.rate(shard)

    # ── The end ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_sums(self) -> None:
        """Tokens and dollars of each tenant, of the archive and of PostgreSQL, are the model's."""
        facts = [fact_of(entry) for shard in self.exported for entry in shard]
        tokens: Counter[str] = Counter()
        for fact in facts:
            tokens[fact.tenant] += fact.tokens
        with Archive(self.path, BLOCK) as archive:
            assert [] == [problem for one in verify(archive, (), marks=marks_of(archive)) for problem in one.problems]
            assert [] == verify_rated(archive).problems
            with Reader(Postings(archive)) as reader:
                usage = list(usage_report(reader, Query(by=("tenant",)), ()).rows())
                cost = list(cost_report(reader, Query(by=("tenant",))).rows())
        spent = {str(row[0]): row[2] for row in usage}
        assert {tenant: tokens[tenant] for tenant in spent} == spent
        assert not [tenant for tenant, sum_of in tokens.items() if sum_of and tenant not in spent]
        billed = {str(row[0]): Decimal(str(row[2])) for row in cost if row[1]}
        assert {tenant: tokens[tenant] * PRICE * 6 for tenant in billed} == billed
        self._check_postgres()

    def _check_postgres(self) -> None:
        with self.sinks() as sinks:
            for sink in sinks[1:]:
                for shard in range(SHARDS):
                    lines = [line for portion in sink.behind(shard, "", 0) for line in portion]
                    assert lines == [line for part in sinks[0].behind(shard, "", 0) for line in part]

    def check_ends(self) -> None:
        """Each reservation has one end, but for those that a loss opened again; and what is open is what should be."""
        for shard in range(SHARDS):
            ends = Counter(one.reservation_id for one in self.booked[shard] if one.kind in ENDS)
            assert not [number for number, count in ends.items() if count > 1]
            mine = [one for one in self.model.open if self.shard_of(TENANTS[int(one[1:]) % len(TENANTS)]) == shard]
            assert len(mine) == self.run(flows.read_head(shard)).open_reservations


ENDS = ("settled", "cancelled", "expired")


def identity(entry: LedgerEntry) -> tuple[Any, ...]:
    """What an entry is, wherever it stands: a fork gives it another number."""
    return (*fact_of(entry), entry.booked_at)


def play(books: Books, history: list[tuple[str, int, int]]) -> None:
    """A history, and its end, at which everything is archived, rated and added up."""
    others: dict[str, Callable[[], None]] = {
        "export": books.export, "trim": books.trim, "compact": books.compact, "rate": books.rate,
        "remember": books.remember, "lose": books.lose, "flush scripts": lambda: books.client.script_flush(),
    }  # fmt: skip
    for verb, which, tokens in history:
        if verb in others:
            others[verb]()
        elif verb in STEPS:
            books.crash(verb)
        else:
            books.act(verb, which, tokens)
    books.check_ends()
    books.act("lapse", 0, 0)
    books.export()
    books.rate()
    books.check_sums()
    books.compact()
    books.export()
    books.check_ends()
    books.meter.close()


VERBS = ["reserve", "reserve", "settle", "cancel", "lapse", "record", "adjust"]
STEPS = ["read", "write", "sync", "link", "compact", "join", "begin", "copy", "commit"]
OTHERS = ["export", "export", "trim", "compact", "rate", "remember", "lose", "flush scripts"]


Step = tuple[str, int, int]


def histories(steps: list[str], chapters: int) -> st.SearchStrategy[list[Step]]:
    """Verbs, and between them what happens to books; now and then a loss of what was exported, in part or in full."""

    def one(words: list[str]) -> st.SearchStrategy[Step]:
        return st.tuples(st.sampled_from(words), st.integers(0, RESERVATIONS - 1), st.integers(0, 9))

    verbs = st.lists(one(VERBS), min_size=1, max_size=6)
    usual = st.tuples(verbs, one([*OTHERS, *steps]).map(lambda step: [step]))
    exported, remembered, lost = ([(name, 0, 0)] for name in ("export", "remember", "lose"))
    seen = st.one_of(st.just(exported), one(steps).map(lambda step: [step]))
    loss = st.tuples(verbs, st.just(exported + remembered), verbs, seen, st.just(lost), verbs)
    several = st.lists(st.one_of(usual, usual, loss), min_size=1, max_size=chapters)
    return several.map(lambda told: [step for chapter in told for part in chapter for step in part])


@contextmanager
def opened(valkey: Server, server: PostgresServer | None = None) -> Iterator[Books]:
    """Empty books."""
    with tempfile.TemporaryDirectory() as folder, valkey.client() as client:
        client.flushall()
        sink = None
        if server is not None:
            schema, url = f"history_{next(test_postgres._schemas)}", server.secret_url
            sink = lambda: Postgres(url, schema, BLOCK)  # noqa: E731
        yield Books(Path(folder), client, sink)


QUIET = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)


@settings(max_examples=6, suppress_health_check=QUIET)
@given(history=histories(STEPS[:6], 4))
def test_the_archive_adds_up_to_the_model_whatever_happens(history: list[Any], valkey: Server) -> None:
    """Two shards and an archive: verbs, repeated ones, crashes at every step, losses, forks, trims, ratings."""
    with opened(valkey) as books:
        play(books, history)


@settings(max_examples=4, suppress_health_check=QUIET)
@given(history=histories(STEPS, 3))
def test_so_does_postgresql(history: list[Any], valkey: Server, postgres_server: PostgresServer) -> None:
    """The same with a second sink, whose writer dies as well."""
    with opened(valkey, postgres_server) as books:
        play(books, history)


@pytest.mark.soak
def test_long_histories_add_up(valkey: Server, postgres_server: PostgresServer) -> None:
    """Longer ones, as many as the time allows; the seed of one that fails is told."""
    until_s, seed = time.monotonic() + soak_seconds(), time.time_ns()
    while time.monotonic() < until_s:
        seed += 1
        chance = random.Random(seed)
        words = [*VERBS * 4, *OTHERS, *STEPS]
        history = [(chance.choice(words), chance.randrange(RESERVATIONS), chance.randrange(10)) for _ in range(150)]
        with opened(valkey, postgres_server) as books:
            try:
                play(books, history)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
