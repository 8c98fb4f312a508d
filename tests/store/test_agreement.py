"""Any history is answered alike by the scripts, on a real server and on fakeredis, and by their pure twin."""

from __future__ import annotations

import copy
import struct
from typing import Any

import fakeredis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from meterlib.core import rules
from meterlib.core.operations import (
    Cancel,
    Find,
    Fork,
    LimitArguments,
    Peek,
    PeekLimit,
    Record,
    Renumbered,
    Reserve,
    Revise,
    Settle,
    Sweep,
)
from meterlib.store.commands import Batch, ReadHead, ReadLedger
from meterlib.store.drivers import SyncDriver
from meterlib.store.keys import layout
from meterlib.store.memory import MemoryDriver, MemoryStore
from meterlib.store.options import StoreOptions
from meterlib.testing import Clock
from tests.conftest import soak_seconds
from tests.store.oracle import Judge, Rule
from tests.support.servers import Server

START_MS = 1_790_000_000_000
PERIOD = (START_MS - 10_000, START_MS + 60_000)
OPTIONS = StoreOptions(shards=1, retention_ms=90_000, sweep_max=2, prefix="t")

LIMITS = [
    Rule("w/a/exact", "requests", 3, "sliding", 10_000, 1),
    Rule("w/a/tokens", "input_tokens", 100, "sliding", 60_000, 1000),
    Rule("w/a/uneven", "input_tokens", 60, "sliding", 1_000, 300),
    Rule("w/b/strict", "input_tokens", 50, "sliding", 5_000, 500, rejects=True),
    Rule("w/b/none", "output_tokens", 0, "sliding", 5_000, 500),
    Rule("w/a/open", "requests", 2, "open"),
    Rule("w/b/open", "input_tokens", 70, "open"),
    Rule("w/a/kept/p", "input_tokens", 150, "period", period=PERIOD),
    Rule("w/a/freed/p", "input_tokens", 120, "period", period=PERIOD, frees=True),
    Rule("w/b/later/p", "requests", 4, "period", period=(PERIOD[1], PERIOD[1] + 60_000)),
]
IDS = [f"r/{tenant}/{name}" for tenant in "ab" for name in ("one", "two", "three")]

ids = st.sampled_from(IDS)
amounts = st.one_of(
    st.integers(0, 3), st.integers(0, 3), st.integers(0, 30), st.integers(0, 200), st.sampled_from([0, 1, 2**53 - 1])
)
leases = st.sampled_from([1, 500, 2_000, 20_000, 20_000, 100_000])
current = st.lists(st.tuples(st.sampled_from(LIMITS[:-1]), amounts), max_size=4, unique_by=lambda pair: pair[0].window)
any_time = st.lists(st.tuples(st.sampled_from(LIMITS), amounts), max_size=4, unique_by=lambda pair: pair[0].window)
wanted = st.one_of(current, current, current, any_time)
units = st.dictionaries(st.sampled_from(["requests", "input_tokens", "output_tokens"]), amounts, max_size=3)
payloads = st.sampled_from(["0123456789abcdef", "fedcba9876543210"])


def arguments(pairs: list[tuple[Rule, int]]) -> tuple[LimitArguments, ...]:
    return tuple(
        LimitArguments(
            limit.window, limit.unit, amount, limit.quota, "reject" if limit.rejects else "admit", limit.length_ms,
            limit.step_ms, *limit.period, "free" if limit.frees else "keep",
        )
        for limit, amount in pairs
    )  # fmt: skip


def plain(answer: Any) -> Any:
    """An answer with all bytes as text, since the twin hands words over as they are."""
    if isinstance(answer, list | tuple):
        return [plain(word) for word in answer]
    if isinstance(answer, dict):
        return {plain(name): plain(word) for name, word in answer.items()}
    return answer.decode("latin-1") if isinstance(answer, bytes) else answer


class Histories(RuleBasedStateMachine):
    """Random histories on three stores at once."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(START_MS)
        self.store = MemoryStore(OPTIONS)
        self.twin = MemoryDriver(self.store, self.clock)
        self.real = self.server.client()
        self.real.flushall()
        self.fake = fakeredis.FakeRedis(server=fakeredis.FakeServer())
        self.scripts = [
            SyncDriver(self.fake, OPTIONS, self.clock, plain=True),
            SyncDriver(self.real, OPTIONS, self.clock),
        ]
        self.judge = Judge()
        self.now_ms = 0
        self.ids = 0
        self.sweep_max = 2
        self.last: tuple[str, Any, list[Any]] | None = None
        self.numbers: list[int] = []
        self.forked: Fork | None = None

    def teardown(self) -> None:
        for driver in self.scripts:
            driver.close()

    # one call, on all of them

    def call(self, name: str, operations: list[Any], sweep_max: int | None = None) -> list[list[Any]]:
        seen = len(self.shard.ledger)
        sweep_max = sweep_max or self.sweep_max
        replies: list[list[Any]] = plain(self.twin.call(Batch(name, 0, sweep_max, operations)))
        for driver in self.scripts:
            assert replies == plain(driver.call(Batch(name, 0, sweep_max, operations)))
        assert self.shard.clock_ms >= self.now_ms, "time went back"

        self.now_ms = self.shard.clock_ms
        if name != "fork":
            before = self.shard.number - (len(self.shard.ledger) - seen)
            self.numbers += range(before + 1, self.shard.number + 1)
        for entry in self.shard.ledger[seen:]:
            if entry["kind"] == "expired":
                self.judge.expired(f"r/{plain(entry['call'])}/{entry['id']}", entry["booked_at"])
        if name in ("settle", "cancel", "record"):
            self.last = (name, operations[-1], replies[-1])
        return replies

    @property
    def shard(self) -> rules.Shard:
        return self.store.shards[0]

    def dump(self, client: Any) -> Any:
        return plain([
            client.hgetall("t:{0}:state"), client.zrange("t:{0}:leases", 0, -1, withscores=True),
            client.lrange("t:{0}:ended", 0, -1), client.xrange("t:{0}:ledger"),
            client.zrange("t:{0}:windows", 0, -1, withscores=True),
        ])  # fmt: skip

    def some_id(self, data: st.DataObject, *statuses: str) -> str:
        """An id whose call is in one of these states; any of the few that are used again and again if there is none."""
        known = [field for field, call in self.judge.calls.items() if call.status in statuses]
        return data.draw(st.sampled_from(known[-4:]) if known else ids)

    def new_id(self, data: st.DataObject) -> str:
        """Mostly an id that was never used."""
        self.ids += 1
        return data.draw(st.one_of(st.just(f"r/{'ab'[self.ids % 2]}/n{self.ids}"), ids))

    # verbs

    @rule(data=st.data())
    def reserve_one(self, data: st.DataObject) -> None:
        """The most frequent call."""
        self.reserve(data, 1)

    @rule(data=st.data(), count=st.sampled_from([1, 2, 3]))
    def reserve(self, data: st.DataObject, count: int) -> None:
        """Reservations of one call, and what the judge says to the answers."""
        asked = [(self.new_id(data), data.draw(payloads), data.draw(wanted), data.draw(leases)) for _ in range(count)]
        operations = [
            Reserve(field, lease, arguments(pairs), digest, field[2].encode(), b'{"e":1}')
            for field, digest, pairs, lease in asked
        ]
        before, untouched = self.dump(self.fake), copy.deepcopy(self.shard)
        for (field, _, pairs, lease), reply in zip(asked, self.call("reserve", operations), strict=True):
            status, now_ms = reply[:2]
            if status == "reserved":
                self.judge.reserved(field, pairs, now_ms, lease)
            elif status == "denied":
                self.judge.denied(pairs, reply[2::6], now_ms)
            elif status in ("open", "conflict"):
                assert self.judge.calls[field].status == "open"
        if (
            all(reply[0] != "reserved" for reply in self.replies_of(operations))
            and len(self.shard.ledger) == len(untouched.ledger)
            and self.shard.ended == untouched.ended
            and self.shard.leases == untouched.leases
        ):
            after = self.dump(self.fake)
            for state in (before[0], after[0]):
                state.pop("head", None)  # that the clock was set back is noted, whatever else happens

            assert before == after, "a denied call changed something"
        if count == 1:
            self.check_retry(operations[0])

    def replies_of(self, operations: list[Reserve]) -> list[list[Any]]:
        """What the same calls would be told now: open if they were just admitted."""
        shard = copy.deepcopy(self.shard)
        work = rules.Work(shard, self.clock.now_ms, layout(1), 0, OPTIONS.retention_ms)
        replies = rules.run("reserve", work, operations)
        return [["reserved"] if reply[0] == "open" else plain(reply) for reply in replies]

    def check_retry(self, operation: Reserve) -> None:
        """After the time that a denial names the call passes if nobody else ran; 1 ms earlier it does not."""

        def at(server_ms: int) -> list[Any]:
            shard = copy.deepcopy(self.shard)
            work = rules.Work(shard, server_ms, layout(1), 0, OPTIONS.retention_ms)
            return list(plain(rules.run("reserve", work, [operation])[0]))

        reply = at(self.clock.now_ms)
        if reply[0] != "denied" or "oversize" in reply[2::6]:
            return
        passes_at = max(at for verdict, at in zip(reply[2::6], reply[3::6], strict=True) if verdict == "quota")
        if any(limit.period_start_ms and passes_at >= limit.period_end_ms for limit in operation.limits):
            return  # the next period is another window: it is empty, and the operation would name it

        assert passes_at > reply[1]
        assert at(passes_at)[0] == "reserved"
        assert at(passes_at - 1)[0] == "denied"

    @rule(data=st.data())
    @precondition(lambda self: self.has("open"))
    def settle_in_time(self, data: st.DataObject) -> None:
        """A settlement of an open reservation, or of one whose lease is over and nobody has noticed."""
        self.settle(data, 1, "ask", ("open",))

    @rule(data=st.data())
    @precondition(lambda self: self.has("expired", "cancelled"))
    def settle_late(self, data: st.DataObject) -> None:
        """Usage of a call that had ended already."""
        self.settle(data, 1, "ask", ("expired", "cancelled"))

    def has(self, *statuses: str) -> bool:
        return any(call.status in statuses for call in self.judge.calls.values())

    @rule(
        data=st.data(),
        count=st.sampled_from([1, 2, 3]),
        if_unknown=st.sampled_from(["ask", "write"]),
        statuses=st.sampled_from([("open",), ("settled", "late"), ()]),
    )
    def settle(self, data: st.DataObject, count: int, if_unknown: str, statuses: tuple[str, ...]) -> None:
        """Settlements: early, late, twice, with another payload, of nothing."""
        asked = [
            (self.some_id(data, *statuses), data.draw(payloads), data.draw(units), data.draw(wanted))
            for _ in range(count)
        ]
        operations = [
            Settle(field, digest, b'{"u":1}', field[2].encode(), if_unknown, tuple(used.items()), arguments(pairs))
            for field, digest, used, pairs in asked
        ]
        for (field, _, used, pairs), reply in zip(asked, self.call("settle", operations), strict=True):
            if reply[0] != "settled":
                continue
            kind, after = reply[2], reply[6]
            if kind == "settled":
                self.judge.settled(field, used)
            elif after in ("expired", "cancelled") and self.judge.calls.get(field) and self.judge.calls[field].at_ms:
                self.judge.late(field, used)
            else:
                self.judge.charged(field, "late", pairs, reply[1])

    @rule(data=st.data(), count=st.sampled_from([1, 1, 2]))
    def cancel(self, data: st.DataObject, count: int) -> None:
        """Cancellations, of unknown ids too."""
        fields = [self.some_id(data, "open") for _ in range(count)]
        for field, reply in zip(fields, self.call("cancel", [Cancel(field) for field in fields]), strict=True):
            if reply[0] == "cancelled" and reply[2]:
                self.judge.cancelled(field)
            elif reply[0] == "cancelled":
                assert self.judge.calls.get(field) is None or self.judge.calls[field].status != "open"

                self.judge.calls.pop(field, None)

    @precondition(lambda self: self.has("open"))
    @rule(data=st.data(), used=units, step=st.sampled_from([-1, 0, 1, 1, 2]), lease=st.sampled_from([0, 500, 30_000]))
    def revise(self, data: st.DataObject, used: dict[str, int], step: int, lease: int) -> None:
        """Better estimates and longer leases, out of order too."""
        field = self.some_id(data, "open")
        present = self.shard.records.get(field)
        revision = max(0, present.revision + step) if isinstance(present, rules.Reservation) else max(0, step)
        operation = Revise(field, revision, lease, 40_000, b'{"e":2}', tuple(used.items()))
        reply = self.call("revise", [operation])[0]
        if reply[0] == "revised":
            self.judge.revised(field, used, reply[3])

    @rule(
        data=st.data(),
        digest=payloads,
        pairs=wanted,
        kind=st.sampled_from(["recorded", "adjusted"]),
        back=st.integers(0, 4),
    )
    def record(self, data: st.DataObject, digest: str, pairs: list[tuple[Rule, int]], kind: str, back: int) -> None:
        """Usage without a reservation, and corrections."""
        field = self.new_id(data)
        pairs = pairs if kind == "recorded" else []
        outcome = b"{}" if kind == "recorded" else self.correction(data, max(0, self.shard.number - back))
        operation = Record(field, kind, digest, field[2].encode(), outcome, arguments(pairs))
        reply = self.call("record", [operation])[0]
        if reply[0] == "recorded":
            self.judge.charged(field, kind, pairs, reply[1])

    def correction(self, data: st.DataObject, n: int) -> bytes:
        """What is told of one: its entry's number, and mostly the id of that entry, or of another."""
        ids = [str(entry["id"]) for entry in self.shard.ledger[-3:]]
        named = data.draw(st.sampled_from(["", *ids]))
        return b'{"adjusts":"0:%d"' % n + (b',"adjusts_id":"%s"}' % named.encode() if named else b"}")

    @rule(sweep_max=st.sampled_from([1, 2]), window_count=st.sampled_from([1, 2, 100]))
    def sweep(self, sweep_max: int, window_count: int) -> None:
        """A piece of a background sweep; calls clear one or two overdue reservations in passing from then on."""
        self.sweep_max = sweep_max
        self.call("sweep", [Sweep(window_count)], 100)

    @rule()
    def repeat(self) -> None:
        """The last call again, as a client does whose time-out came before the answer: it is told the same."""
        if self.last and self.last[2][0] in ("settled", "recorded", "cancelled"):
            name, operation, answer = self.last
            again = self.call(name, [operation])[0]
            told = slice(2, 6) if name != "cancel" else slice(2, 5)

            assert again[0] == "repeated"
            assert answer[told] == again[told]

    @rule(
        kept=st.integers(0, 4),
        ahead=st.integers(0, 3),
        later=st.sampled_from([False, False, True]),
        runs=st.lists(st.integers(0, 2), max_size=2),
        since=st.sampled_from([0, 0, 0, 1, 2]),
        early_ms=st.sampled_from([0, 1, 5_000]),
    )
    def fork(self, kept: int, ahead: int, later: bool, runs: list[int], since: int, early_ms: int) -> None:
        """The ledger lost its last entries, and was exported further than it is now; more than once, perhaps, and some
        of its entries under the numbers of a fork that it lost. Some entries are there that nobody has seen."""
        if not self.shard.layout:
            return
        before = self.shard.number
        kept_n = max(0, before - kept)
        follows_epoch = self.shard.epoch + 5_000_000 * later
        follows_n = max(1, before + ahead)
        known = []
        for at, more in enumerate(runs):
            follows_n += 3
            known.append(Renumbered(kept_n + 1 + 3 * at, kept_n + 1 + 3 * at + more, follows_n - 2))
        (last, *unseen) = [{"id": "", "n": 0, "booked_at": 0}, *self.shard.ledger][-1 - since :]
        seen = (last["id"], last["n"], last["booked_at"], self.now_ms - early_ms)
        operation = Fork(*seen, self.shard.epoch, follows_epoch, follows_n, kept_n, tuple(known))
        if unseen and unseen[0]["booked_at"] < operation.seen_at_ms:
            assert "changed" == self.call("fork", [operation])[0][0]
            return
        exported = {number for run in known for number in range(run.first_n, run.last_n + 1)}
        moving = [number for number in self.numbers if number > kept_n and number not in exported]
        for entry in self.shard.ledger:
            if entry["n"] > kept_n and entry["n"] in exported:
                self.judge.entries.remove((entry["kind"], f"r/{plain(entry['call'])}/{entry['id']}"))
        status, _, epoch, first, moved = self.call("fork", [operation])[0]

        assert ("forked", len(moving)) == (status, moved)
        assert first > max(before, operation.follows_n)
        assert epoch > follows_epoch
        self.numbers = [number for number in self.numbers if number <= kept_n] + [*range(first, first + moved)]
        self.forked, self.last = operation, None

    @precondition(lambda self: self.forked is not None)
    @rule(other=st.booleans())
    def fork_again(self, other: bool) -> None:
        """The same call again is told the same; one by whom another epoch was looked at changes nothing."""
        assert self.forked is not None

        operation = self.forked._replace(follows_n=self.forked.follows_n + 1) if other else self.forked
        assert ("changed" if other else "repeated") == self.call("fork", [operation])[0][0]

    # time, and what servers do

    @rule(ms=st.one_of(st.integers(1, 2_000), st.integers(1, 70_000), st.integers(-30_000, -1)))
    def pass_time(self, ms: int) -> None:
        """The clock goes on, or is set back."""
        self.clock.advance(ms=ms)
        self.last = None

    @rule(data=st.data(), offset_ms=st.sampled_from([-1, 0, 1]))
    def reach(self, data: st.DataObject, offset_ms: int) -> None:
        """The moment at which something slides out, a lease ends or an id is forgotten; just before it, or after."""
        moments = [entry.time_ms + window.span_ms for window in self.shard.windows.values() for entry in window.entries]
        moments += [lease for lease, _ in self.shard.leases]
        moments += [ended_at + OPTIONS.retention_ms for ended_at, _ in self.shard.ended]
        ahead = sorted({moment + offset_ms for moment in (*moments, *PERIOD) if moment + offset_ms > self.clock.now_ms})
        if ahead:
            self.clock.set(data.draw(st.sampled_from(ahead[:12])))
            self.last = None

    @rule()
    def forget_scripts(self) -> None:
        """SCRIPT FLUSH, a restart or a failover."""
        self.real.script_flush()
        self.fake.script_flush()

    @initialize()
    def begin(self) -> None:
        """Nothing is there yet."""
        assert self.call("find", [Find(IDS[0])])[0][0] == "absent"

    # what is true at any time

    @invariant()
    def windows_are_as_the_judge_counts(self) -> None:
        """Every window counts what its calls make it count, at this moment."""
        operation = Peek(tuple(PeekLimit(limit.window, limit.length_ms, 0, 0) for limit in LIMITS))
        reply = self.call("peek", [operation])[0]
        for position, limit in enumerate(LIMITS):
            settled, held = reply[2 + 4 * position : 4 + 4 * position]

            assert settled >= 0
            assert held >= 0
            self.judge.counted(limit.window, settled, held, reply[1], self.shard.clock_ms)

    @invariant()
    def every_id_is_found_as_it_is(self) -> None:
        """Looking for ids tells the same everywhere."""
        fields = sorted(self.judge.calls)[-5:]
        if fields:
            self.call("find", [Find(field) for field in fields])

    @invariant()
    def ledgers_agree(self) -> None:
        """All ledgers are the same, numbered without a gap, with one terminal entry for each reservation."""
        ledger = plain(self.twin.execute(ReadLedger(0, 0, 10_000)))
        head = self.twin.execute(ReadHead(0))
        for driver in self.scripts:
            assert ledger == plain(driver.execute(ReadLedger(0, 0, 10_000)))
            assert head == driver.execute(ReadHead(0))
        assert self.numbers == [number for number, _ in ledger]
        kinds = [(fields["kind"], f"r/{fields['call']}/{fields['id']}") for _, fields in ledger]
        assert sorted(kinds) == sorted(self.judge.entries)

    @invariant()
    def servers_hold_the_same(self) -> None:
        """Nothing is stored differently on another server, and no work is left pending."""
        fake = self.dump(self.fake)

        assert fake == self.dump(self.real)
        assert "pending" not in fake[0]
        assert dict(fake[4]) == self.shard.ends
        assert {field for field in fake[0] if field.startswith("w/")} == set(self.shard.ends)

    @invariant()
    def the_head_knows_when_something_is_due(self) -> None:
        """Calls look for overdue leases and forgettable ids only from the times on that the head names."""
        client: Any = self.real
        head = client.hget("t:{0}:state", "head")
        if head:
            due_ms, ended_ms = struct.unpack_from(">2d", head, 32)
            leases = client.zrange("t:{0}:leases", 0, 0, withscores=True)
            ended = client.lrange("t:{0}:ended", 0, 0)

            assert all(due_ms <= score for _, score in leases)
            assert all(ended_ms <= int(item.partition(b" ")[0]) for item in ended)


def run(server: Server, examples: int, steps: int) -> None:
    machine = type("Machine", (Histories,), {"server": server})
    quick = settings(max_examples=examples, stateful_step_count=steps, report_multiple_bugs=False)
    run_state_machine_as_test(machine, settings=quick)


def test_any_history_is_answered_alike_by_scripts_and_twin(valkey: Server) -> None:
    """What a test with MemoryMeter shows is what a gateway on Valkey will see."""
    run(valkey, 100, 40)


def test_any_history_is_answered_alike_on_redis_7(redis7: Server) -> None:
    """The same scripts give the same answers on Redis 7.0."""
    run(redis7, 25, 30)


@pytest.mark.soak
def test_long_histories_are_answered_alike(valkey: Server) -> None:
    """Many more and longer histories, as far as the time allows."""
    run(valkey, max(20, int(soak_seconds() * 4)), 80)
