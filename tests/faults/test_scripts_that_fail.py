"""An error at every single command of every script: whoever comes next finishes the work, as if nothing had been."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import redis

from meterlib import Meter, StoreError
from meterlib.store.scripts import lua_folder, script
from meterlib.testing import Clock
from tests.faults.world import (
    ATTRIBUTES,
    ESTIMATE,
    OPTIONS,
    POLICY,
    STATE,
    TENANT,
    USED,
    VERBS,
    Verb,
    ask,
    build,
    check_books,
    contents,
    raw,
    restore,
    standing,
)
from tests.support.servers import Server

COMMANDS_MAX = 60
BY_SHA = {script(path.stem).sha: path.stem for path in lua_folder().glob("*.lua")}
each_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)

MEANWHILE: tuple[Callable[[Meter], object], ...] = (
    lambda meter: meter.settle(TENANT, "other", USED),
    lambda meter: meter.reserve("another", ATTRIBUTES, ESTIMATE, reservation_id="theirs"),
    lambda meter: meter.revise(TENANT, "other", USED, revision=1),
    lambda meter: meter.cancel(TENANT, "other"),
    lambda meter: meter.record("another", ATTRIBUTES, USED, record_id="theirs"),
    lambda meter: meter.sweep(),
    lambda meter: (meter.peek(TENANT, ATTRIBUTES), meter.find(TENANT, "other")),
)


IN_PARTS = ("settle an unknown one", "sweep")
"""Verbs of several script calls: the first may have its effect without the others."""


@cache
def failing(name: str, command: int) -> str:
    """The script, but raising in place of its `command`th command."""
    flags, _, body = script(name).text.partition("\n")
    counted, places = re.subn(r"\bredis\.call\b", "counted_call", body)
    assert places > 0
    return f"""{flags}
local commands_left = {command}
local function counted_call(...)
  commands_left = commands_left - 1
  if commands_left == 0 then error('injected') end
  return redis.call(...)
end
{counted}"""


class FailingClient(redis.Redis):
    """A client that can be told to let the next script fail at its n-th command, or the one after that."""

    fail_at = 0
    healthy_before = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a failing text in place of a script, if told so."""
        execute: Callable[..., Any] = super().execute_command
        if args[0] == "EVALSHA" and self.fail_at:
            if self.healthy_before == 0:
                text, self.fail_at = failing(BY_SHA[args[1]], self.fail_at), 0
                return execute("EVAL", text, *args[2:], **options)
            self.healthy_before -= 1
        return execute(*args, **options)


@pytest.fixture
def client(server: Server) -> Iterator[FailingClient]:
    with FailingClient(port=server.port) as connected:
        yield connected


@pytest.fixture
def spoilt(client: FailingClient, direct: redis.Redis, clock: Clock) -> Meter:
    """A meter whose scripts can be told to fail."""
    return Meter(client, POLICY, options=OPTIONS, clock=clock)


def fails(act: Callable[[], object]) -> bool:
    """Whether the failure that was ordered came to pass."""
    try:
        act()
    except StoreError as error:
        if "injected" not in str(error):
            raise
        return True
    return False


def failures(spoilt: Meter, client: FailingClient, verb: Verb, prepare: Callable[[], None]) -> Iterator[None]:
    """Let the verb fail at the first, second, … command of its first, second, … script call, as long as there is one.

    Each time after `prepare`; what follows a failure is the caller's.
    """
    for healthy_before in range(6):
        for command in range(1, COMMANDS_MAX):
            prepare()
            client.fail_at, client.healthy_before = command, healthy_before
            if not fails(lambda: verb.act(spoilt)):
                missed = client.fail_at  # there were not so many script calls
                client.fail_at = 0
                assert command > 1 or missed
                break
            yield
        else:
            raise AssertionError(f"{verb.name} has more commands than {COMMANDS_MAX}")
        if missed:
            return


def preparation(spoilt: Meter, direct: redis.Redis, clock: Clock) -> Callable[[], None]:
    """What makes the same world again and again."""
    build(spoilt, clock)
    saved = raw(direct)
    return lambda: restore(direct, saved)


def outcome(spoilt: Meter, direct: redis.Redis) -> dict[str, object]:
    """All that the store holds once everything that is due has been done."""
    spoilt.sweep()
    spoilt.sweep()
    check_books(spoilt)
    return contents(direct)


@each_verb
def test_a_verb_repeated_after_a_failure_at_any_command_leaves_what_it_would_have_left(
    verb: Verb, spoilt: Meter, client: FailingClient, direct: redis.Redis, clock: Clock
) -> None:
    """Finance: a script that dies half way loses nothing and doubles nothing; the same call again completes it."""

    prepare = preparation(spoilt, direct, clock)
    prepare()
    answer, expected = verb.answer(spoilt), outcome(spoilt, direct)
    times = 0
    for _ in failures(spoilt, client, verb, prepare):
        times += 1
        assert verb.answer(spoilt) == answer
        assert outcome(spoilt, direct) == expected
    assert times >= 5


@each_verb
def test_somebody_else_coming_first_after_a_failure_changes_nothing_about_that(
    verb: Verb, spoilt: Meter, client: FailingClient, direct: redis.Redis, clock: Clock, server: Server
) -> None:
    """Finance: work left half done is finished by whoever comes next, before its own, and in the order of the books."""
    others = MEANWHILE

    prepare = preparation(spoilt, direct, clock)

    def world(*acts: Callable[[Meter], object]) -> dict[str, object]:
        prepare()
        for act in acts:
            act(spoilt)
        return outcome(spoilt, direct)

    for other in others if server.kind == "valkey" else others[:1]:
        if_first, if_second = world(verb.act, other), world(other, verb.act)
        for _ in failures(spoilt, client, verb, prepare):
            decided = ask(direct, "HEXISTS", STATE, "pending") and verb.name not in IN_PARTS
            other(spoilt)
            verb.act(spoilt)
            found = outcome(spoilt, direct)
            assert found == if_first if decided else found in (if_first, if_second)


@each_verb
def test_a_failure_while_work_left_half_done_is_being_finished_is_no_worse(
    verb: Verb, spoilt: Meter, client: FailingClient, direct: redis.Redis, clock: Clock, server: Server
) -> None:
    """Finance: two failures in a row, wherever they strike, lose nothing and double nothing either."""
    if server.kind != "valkey" and verb.name != "settle":
        pytest.skip("one verb is enough to see that this server finishes work in the same way")

    prepare = preparation(spoilt, direct, clock)

    def settle_other() -> None:
        spoilt.settle(TENANT, "other", USED)

    expected = []
    orders: list[list[Callable[[], object]]] = [
        [lambda: verb.act(spoilt), settle_other],
        [settle_other, lambda: verb.act(spoilt)],
    ]
    for acts in orders:
        prepare()
        for act in acts:
            act()
        expected.append(outcome(spoilt, direct))
    for _ in failures(spoilt, client, verb, prepare):
        if not ask(direct, "HEXISTS", STATE, "pending"):
            continue
        left = raw(direct)
        for second in range(1, COMMANDS_MAX):
            restore(direct, left)
            client.fail_at, client.healthy_before = second, 0
            if not fails(settle_other):
                client.fail_at = 0
                break
            settle_other()
            verb.act(spoilt)
            found = outcome(spoilt, direct)
            assert found in expected if verb.name in IN_PARTS else found == expected[0]
        assert second > 5


def test_what_is_left_half_done_is_finished_by_a_sweep_alone(
    spoilt: Meter, client: FailingClient, direct: redis.Redis, clock: Clock
) -> None:
    """Finance: an entry that was decided is written in time even if no other call of that shard ever comes."""

    prepare = preparation(spoilt, direct, clock)
    settle = next(verb for verb in VERBS if verb.name == "settle")
    prepare()
    settle.act(spoilt)
    expected = outcome(spoilt, direct)
    committed = 0
    for _ in failures(spoilt, client, settle, prepare):
        if ask(direct, "HEXISTS", STATE, "pending"):
            committed += 1
            assert outcome(spoilt, direct) == expected
    assert committed >= 3


def test_a_reader_sees_all_of_a_decision_or_none_of_it(
    spoilt: Meter, client: FailingClient, direct: redis.Redis, clock: Clock
) -> None:
    """Operator: limits and reservations agree with each other at every moment, even after a failure."""

    prepare = preparation(spoilt, direct, clock)
    settle = next(verb for verb in VERBS if verb.name == "settle")
    prepare()
    before = (spoilt.find(TENANT, "mine").status, standing(spoilt))
    settle.act(spoilt)
    after = (spoilt.find(TENANT, "mine").status, standing(spoilt))
    assert (before[0], after[0]) == ("open", "settled")
    for _ in failures(spoilt, client, settle, prepare):
        assert (spoilt.find(TENANT, "mine").status, standing(spoilt)) in (before, after)
