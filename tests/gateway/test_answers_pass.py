"""Clients get the provider's bytes, as they come; and the ledger gets what these bytes say was used."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib.gateway.call import PING as OUR_PING
from meterlib.gateway.sse import UsageStream
from tests.gateway.answers import (
    FUTURE,
    MODEL,
    PING,
    STOP,
    STREAMS,
    Answer,
    Hold,
    delta,
    encodings,
    failing,
    message,
    mixed,
    said,
    start,
    stream,
)
from tests.gateway.books import WIDE, ended, read, read_to_end, size_of, told, until
from tests.gateway.world import HOSTED, World, run

LineEnd = Literal["\n", "\r\n", "\r"]
LINE_ENDS: tuple[LineEnd, ...] = ("\n", "\r\n", "\r")
EVENTS = STREAMS["cached"].events
each_stream = pytest.mark.parametrize("name", STREAMS)
each_line_end = pytest.mark.parametrize("line_end", LINE_ENDS, ids=["LF", "CRLF", "CR"])


async def passes(world: World, answer: Answer, usage: dict[str, Any], *, streamed: bool = True) -> None:
    """The answer arrives byte for byte, and is booked as said."""
    known = len(await world.entries())
    world.provider.answers(answer)
    got = await world.post(stream=streamed)

    assert got.whole
    assert (200, answer.body()) == (got.status, got.body)
    entry = (await ended(world))[known]
    assert told(usage) == entry.usage
    assert ("settled", "complete", "200") == (entry.kind, entry.facts["end"], entry.facts["status"])


# ── The bytes, and the usage ──────────────────────────────────────────────────────────────────────────────────────────


@each_line_end
@each_stream
def test_streams_pass_whatever_their_pieces(name: str, line_end: LineEnd) -> None:
    """One byte at a time, seven, each event on its own, all at once; as LF, CRLF and CR end their lines."""

    async def use(world: World) -> None:
        for cut_every in (1, 7, None, 1 << 20):
            answer = Answer(events=STREAMS[name].events, cut_every=cut_every, line_end=line_end)
            await passes(world, answer, STREAMS[name].usage)

    run(use, HOSTED, limits=WIDE)


@given(
    name=st.sampled_from(sorted(STREAMS)),
    encoding=st.sampled_from([None, *encodings()]),
    line_end=st.sampled_from(LINE_ENDS),
    cuts=st.lists(st.integers(1, 6000), max_size=8),
    framing=st.sampled_from(["chunked", "length"]),
    dressed=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=80)
def test_streams_pass_however_they_are_written(
    name: str,
    encoding: Any,
    line_end: LineEnd,
    cuts: list[int],
    framing: Any,
    dressed: tuple[bool, bool, bool, bool],
) -> None:
    """Cut anywhere, encoded or not, with comments, pings and unknown events in between, with or without spaces."""
    many_lines, space, open_end, crowded = dressed
    events = mixed(STREAMS[name].events, PING, "a comment, 注釈", FUTURE) if crowded else STREAMS[name].events
    answer = Answer(
        events=events,
        encoding=encoding,
        line_end=line_end,
        cut_at=cuts,
        framing=framing,
        many_lines=many_lines,
        space=space,
        open_end=open_end,
    )
    run(lambda world: passes(world, answer, STREAMS[name].usage), HOSTED, limits=WIDE)


@each_stream
def test_plain_answers_pass(name: str) -> None:
    """The same usages in answers of one JSON document, in any pieces and any encoding."""

    async def use(world: World) -> None:
        document = message(usage=STREAMS[name].usage, text=STREAMS[name].text, stop_reason=STREAMS[name].stop_reason)
        for encoding in (None, *encodings()):
            for cut_every in (1, 7, None):
                answer = Answer(json=document, encoding=encoding, cut_every=cut_every)
                await passes(world, answer, STREAMS[name].usage, streamed=False)

    run(use, HOSTED, limits=WIDE)


QUALITIES = [
    ({"input_tokens": 5, "output_tokens": 3}, "final"),
    ({"input_tokens": 0, "output_tokens": 0}, "final"),
    ({"input_tokens": 5, "output_tokens": None}, "estimated"),
    ({"output_tokens": 3}, "estimated"),
    ({}, "estimated"),
    ({"input_tokens": 5, "cache_creation_input_tokens": 9, "output_tokens": 3}, "split_unknown"),
    (
        {
            "input_tokens": 5,
            "cache_creation_input_tokens": 9,
            "cache_creation": {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 5},
            "output_tokens": 3,
        },
        "final",
    ),
]


@pytest.mark.parametrize(("usage", "quality"), QUALITIES, ids=[f"{n}" for n in range(len(QUALITIES))])
def test_zero_is_a_number_and_unknown_is_none(usage: dict[str, Any], quality: str) -> None:
    """A reported 0 is charged as 0; what was not reported stays unknown, and the estimate stands for it."""

    async def use(world: World) -> None:
        await passes(world, Answer(json=message(usage=usage)), usage, streamed=False)
        await passes(world, Answer(events=[start(usage), STOP]), usage)
        plain, streamed = await ended(world)

        assert (quality, quality) == (plain.quality, streamed.quality)
        known = {name for name, value in usage.items() if value is not None}
        assert known == set(plain.usage) == set(streamed.usage)

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("stop_reason", ["refusal", "pause_turn", "model_context_window_exceeded", "max_tokens"])
def test_other_reasons_to_stop_are_successes(stop_reason: str) -> None:
    """Also with no content at all, as `max_tokens: 0` has it."""
    usage = {"input_tokens": 40, "output_tokens": 0}

    async def use(world: World) -> None:
        answer = Answer(json=message(usage=usage, text="", stop_reason=stop_reason))
        await passes(world, answer, usage, streamed=False)
        events = stream(usage_start=usage, usage_end={"output_tokens": 0}, text="", stop_reason=stop_reason)
        await passes(world, Answer(events=events), usage)

        assert {"final"} == {entry.quality for entry in await ended(world)}

    run(use, HOSTED, limits=WIDE)


def test_passes_of_an_unknown_kind_are_flagged() -> None:
    """They may be billed besides; nobody here knows."""
    usage = {"input_tokens": 5, "output_tokens": 5}
    kinds = ["message", "compaction", "advisor_message", "fallback_message", "summary", "dream", "dream", "sk-\u00a0"]

    async def use(world: World) -> None:
        for some in (kinds, kinds[:4], kinds[4:7]):
            iterations = [{"type": kind, **usage} for kind in some]
            world.provider.answers(Answer(json=message(usage={**usage, "iterations": iterations})))
            assert 200 == (await world.post()).status
        entries = await ended(world)

        assert ["dream,sk??,summary", None, "dream,summary"] == [
            entry.facts.get("unknown_iterations") for entry in entries
        ]
        assert [8, 4, 3] == [len(entry.usage["iterations"]) for entry in entries]  # type: ignore[arg-type]

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("name", [" claude", "claude ", "sk-ant-x", "\ufb01", "x" * 300, "\n", "", 5])
def test_a_model_of_an_odd_name_keeps_nothing_from_being_booked(name: Any) -> None:
    """What cannot be a fact is left out."""

    async def use(world: World) -> None:
        world.provider.answers(Answer(json={**message(usage={"input_tokens": 5, "output_tokens": 5}), "model": name}))
        await world.post()
        (entry,) = await ended(world)
        assert ("final", None) == (entry.quality, entry.facts.get("model"))

    run(use, HOSTED, limits=WIDE)


def test_facts_tell_what_the_provider_told() -> None:
    """Its request id, or else the one made for the client; the model that answered, if it is not the one asked for."""

    async def use(world: World) -> None:
        usage = {"input_tokens": 4, "output_tokens": 2}
        other = stream(usage_start=usage, usage_end=usage, model="claude-haiku-4-5-20251001")
        world.provider.answers(
            Answer(events=other, headers={"request-id": "req_011abc"}),
            Answer(json=message(usage=usage, model=MODEL), headers={"request-id": "req_012"}),
            Answer(json=message(usage=usage, model="x" * 300), headers={"request-id": "y" * 300}),
            Answer(json=message(usage=usage, model="line\nbreak"), without=["request-id"]),
        )
        for streamed in (True, False, False):
            await world.post(stream=streamed, model=MODEL)
        got = await world.post()
        first, second, *odd = await ended(world)

        assert ("req_011abc", "claude-haiku-4-5-20251001") == (first.facts["request_id"], first.facts["model"])
        assert MODEL == first.attributes["model"]
        assert "req_012" == second.facts["request_id"]
        assert "model" not in second.facts
        assert got.headers["request-id"] == odd[1].facts["request_id"]
        assert not any("model" in entry.facts or len(entry.facts["request_id"]) > 40 for entry in odd)
        assert ["final", "final"] == [entry.quality for entry in odd]

    run(use, HOSTED, limits=WIDE)


ODD_USAGES: list[dict[str, Any]] = [
    {"input_tokens": -1, "output_tokens": 2**60},
    {"input_tokens": "7", "output_tokens": 3.5},
    {"input_tokens": True, "output_tokens": [1]},
    {"input_tokens": 5, "output_tokens": 3, "service_tier": "x" * 500},
    {"input_tokens": 5, "output_tokens": 3, "service_tier": "a\nb", "speed": 7, "inference_geo": ""},
    {"input_tokens": 5, "output_tokens": 3, "iterations": [{"type": "x" * 1000, "input_tokens": -4}]},
    {"input_tokens": 5, "output_tokens": 3, "iterations": {"a": 1}, "cache_creation": 9, "server_tool_use": []},
    {"input_tokens": 5, "output_tokens": 3, "cache_creation": {"ephemeral_5m_input_tokens": -1}},
]


@pytest.mark.parametrize("usage", ODD_USAGES, ids=[f"{n}" for n in range(len(ODD_USAGES))])
def test_odd_numbers_harm_nobody(usage: dict[str, Any]) -> None:
    """What makes no sense was not told; the client has its answer, and the call is settled."""

    async def use(world: World) -> None:
        events = [start(usage), *said("x"), delta(usage), STOP]
        for answer in (Answer(json=message(usage=usage)), Answer(events=events)):
            world.provider.answers(answer)
            got = await world.post(stream=answer.json is None)

            assert (200, True, answer.body()) == (got.status, got.whole, got.body)
        await ended(world, kinds={"settled": 2})

    run(use, HOSTED, limits=WIDE)


def test_usage_that_can_hardly_be_is_booked_as_told_and_flagged() -> None:
    """Finance: nobody but the provider knows, and somebody is told to look."""

    async def use(world: World) -> None:
        for output_tokens in (64_000, 64_001):
            world.provider.answers(Answer(json=message(usage={"input_tokens": 5, "output_tokens": output_tokens})))
            assert 200 == (await world.post(max_tokens=64)).status
        entries = await ended(world)

        assert [64_000, 64_001] == [entry.usage["output_tokens"] for entry in entries]
        assert [None, "output_tokens"] == [entry.facts.get("implausible") for entry in entries]

    run(use, HOSTED, limits=WIDE)


# ── As it comes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("encoding", [None, *encodings()])
def test_every_event_is_there_before_the_next_is_sent(encoding: Any) -> None:
    """Nothing is held back, compressed or not."""

    async def use(world: World) -> None:
        holds = [Hold() for _ in EVENTS]
        items = [item for event, hold in zip(EVENTS, holds, strict=True) for item in (event, hold)]
        whole = Answer(events=EVENTS, encoding=encoding).body()
        world.provider.answers(Answer(events=items, encoding=encoding))
        seen = b""
        async with world.asked(stream=True) as response:
            for hold in holds:
                await hold.reached()
                sent = world.provider.requests[0].sent
                seen += await read(response, sent - len(seen))
                hold.release()
            rest, complete = await read_to_end(response)

        assert (whole, True) == (seen + rest, complete)
        await ended(world, kinds={"settled": 1})

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_nothing_on_its_way_may_hold_a_stream_back(framing: Any) -> None:
    """Neither caches nor proxies; and its length may change by a ping."""

    async def use(world: World) -> None:
        headers = {"cache-control": "public, max-age=60"}
        world.provider.answers(Answer(events=EVENTS, framing=framing, headers=headers))
        got = await world.post(stream=True)

        assert ("no-cache", "no") == (got.headers["cache-control"], got.headers["x-accel-buffering"])
        assert "content-length" not in got.headers
        plain = await world.post()
        assert str(len(plain.body)) == plain.headers["content-length"]
        assert "x-accel-buffering" not in plain.headers

    run(use, HOSTED, limits=WIDE)


def test_plain_answers_are_not_held_back() -> None:
    """Half of a JSON document is there before the other half is sent."""

    async def use(world: World) -> None:
        hold, body = Hold(), json.dumps(message(usage=STREAMS["cached"].usage)).encode()
        json_headers = {"content-type": "application/json"}
        world.provider.answers(
            Answer(events=[body[:50], hold, body[50:]], headers=json_headers),
        )
        async with world.asked() as response:
            await hold.reached()
            first = await read(response, 50)
            hold.release()
            rest, complete = await read_to_end(response)

        assert (body, True) == (first + rest, complete)
        assert told(STREAMS["cached"].usage) == (await ended(world))[0].usage

    run(use, HOSTED, limits=WIDE)


def test_the_head_is_there_before_the_body() -> None:
    """A client that waits for the head of a slow stream has it as soon as the provider sent it."""

    async def use(world: World) -> None:
        hold = Hold()
        world.provider.answers(Answer(events=[hold, *EVENTS]))
        async with world.asked(stream=True) as response:
            await hold.reached()

            assert 200 == response.status
            hold.release()
            assert (Answer(events=EVENTS).body(), True) == await read_to_end(response)

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("piece", [10, 4000, 1 << 16, 1 << 20], ids="{} bytes".format)
def test_little_is_kept_of_a_long_answer(piece: int) -> None:
    """Whatever the size of its pieces, what a stream takes in memory does not grow with its length."""
    reader, event = UsageStream(), Answer(events=said("x" * piece, characters=piece)[1:2]).body()
    tracemalloc.start()
    try:
        for _ in range(min(20_000, (16 << 20) // len(event))):
            reader.feed(event)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most < 8 << 20


# ── While it comes ────────────────────────────────────────────────────────────────────────────────────────────────────


async def input_now(world: World) -> tuple[int, int]:
    """What counts of the limit of input tokens, and what of that is held."""
    limits = await world.meter.peek("acme", {"provider": "anthropic"})
    return next((limit.used, limit.held) for limit in limits if limit.unit == "input_tokens")


def test_the_exact_input_replaces_the_estimate_while_the_stream_is_open() -> None:
    """As soon as `message_start` tells it, whether it is more or less; other calls need not wait for the end."""

    async def use(world: World) -> None:
        for exact in (9, 8000):
            hold = Hold()
            usage = {"input_tokens": exact - 2, "cache_creation_input_tokens": 2, "output_tokens": 1}
            events = stream(usage_start=usage, usage_end={"output_tokens": 7})
            world.provider.answers(Answer(events=[events[0], hold, *events[1:]]))
            before, _ = await input_now(world)
            async with world.asked(text="x" * 2000 if exact == 9 else "x", stream=True) as response:
                await hold.reached()
                await read(response, size_of(events, 1))
                async with asyncio.timeout(5):
                    while (before + exact, exact) != await input_now(world):
                        await asyncio.sleep(0.001)
                hold.release()
                await read_to_end(response)
            await ended(world)

    run(use, HOSTED, limits=WIDE)


def test_the_lease_of_a_long_call_is_renewed() -> None:
    """A call that takes longer than its lease is still one call with one entry."""

    async def use(world: World) -> None:
        hold = Hold()
        world.provider.answers(Answer(events=[*EVENTS[:2], hold, *EVENTS[2:]]))
        async with world.asked(stream=True) as response:
            await hold.reached()
            for _ in range(12):
                world.advance(ms=20_000)
                await until(lambda: not world.gateway._background)
                await world.meter.sweep()
            assert 1 == await world.open_reservations()
            hold.release()
            await read_to_end(response)
        (entry,) = await ended(world, kinds={"settled": 1})

        assert told(STREAMS["cached"].usage) == entry.usage

    run(use, HOSTED, limits=WIDE, lease_ms=60_000)


@pytest.mark.parametrize("tended", [True, False])
def test_a_call_whose_lease_ran_out_is_charged_for_what_it_used(tended: bool) -> None:
    """A process that stood still for too long, and went on: the reservation has expired, and its usage comes late."""

    async def use(world: World) -> None:
        hold = Hold()
        world.provider.answers(Answer(events=[*EVENTS[:2], hold, *EVENTS[2:]]))
        async with world.asked(stream=True) as response:
            await hold.reached()
            world.clock.advance(ms=60_001)
            await world.meter.sweep()
            if tended:
                world.gateway.tend()
            hold.release()
            body, complete = await read_to_end(response)
        await world.settled()
        expired, late = await world.entries()

        assert (Answer(events=EVENTS).body(), True) == (body, complete)
        assert ("expired", "late", "expired") == (expired.kind, late.kind, late.after)
        assert told(STREAMS["cached"].usage) == late.usage
        assert 0 == await world.open_reservations()
        assert (511, 0) == await input_now(world)

    run(use, HOSTED, limits=WIDE, lease_ms=60_000, ping_after_ms=0)


# ── Pings ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

PLACES: list[tuple[str, int, bool]] = [
    ("before the first event", 0, True),
    ("after message_start", size_of(EVENTS, 1), True),
    ("behind a line of an event", size_of(EVENTS, 2) + 27, False),
    ("inside an event", size_of(EVENTS, 3) + 40, False),
    ("inside the end of an event", size_of(EVENTS, 4) - 1, False),
    ("before message_stop", size_of(EVENTS, len(EVENTS) - 1), True),
    ("inside message_stop", size_of(EVENTS, len(EVENTS)) - 5, False),
    ("after message_stop", size_of(EVENTS, len(EVENTS)), False),
]


async def pinged_at(world: World, answer: Answer, hold: Hold, at: int) -> tuple[bytes, bytes, bytes]:
    """The answer's bytes before its hold, what a long silence there adds, and its bytes behind."""
    world.provider.answers(answer)
    async with world.asked(stream=True) as response:
        await hold.reached()
        before = await read(response, at) if at else b""
        # What was read by the client was passed on before, and so it was looked at.
        await until(lambda: world.gateway.open_calls)
        world.advance(ms=14_999)
        world.advance(ms=1)
        world.advance(ms=0)
        hold.release()
        after, complete = await read_to_end(response)
        assert complete
    ping = OUR_PING if after.startswith(OUR_PING) else b""
    return before, ping, after.removeprefix(OUR_PING)


@pytest.mark.parametrize(("place", "at", "fits"), PLACES, ids=[place for place, _, _ in PLACES])
def test_a_silent_stream_is_kept_alive_between_events_only(place: str, at: int, fits: bool) -> None:
    """One ping after each 15 s of silence; a client that reads events sees the provider's events, and a ping."""

    async def use(world: World) -> None:
        body, hold = Answer(events=EVENTS).body(), Hold()
        answer = Answer(events=[body[:at], hold, body[at:]])
        before, ping, after = await pinged_at(world, answer, hold, at)

        assert (body[:at], OUR_PING if fits else b"", body[at:]) == (before, ping, after)
        (entry,) = await ended(world)
        assert (told(STREAMS["cached"].usage), "final") == (entry.usage, entry.quality)

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize(
    ("lines", "fits"),
    [
        (b": a comment\n", True),
        (b": a comment\n\n", True),
        (b"id: 7\n", False),
        (b"retry: 10\n", False),
        (b"event: x\n", False),
        (b"data\n", False),
        (b"event: x\ndata: {}\n\n", True),
        (b"event: x\r\ndata: {}\r\n\r", False),
        (b"event: x\r\ndata: {}\r\n\r\n", True),
        (b": caf\xc3", False),
    ],
)
def test_a_ping_never_becomes_part_of_another_event(lines: bytes, fits: bool) -> None:
    """Half a line, or lines of an event that is not over yet: the ping would change what they mean."""

    async def use(world: World) -> None:
        hold = Hold()
        begin = Answer(events=EVENTS[:1]).body() + lines
        answer = Answer(events=[begin, hold, b"\n\n", *EVENTS[1:]])
        _, ping, after = await pinged_at(world, answer, hold, len(begin))

        assert (OUR_PING if fits else b"") == ping
        assert Answer(events=[b"\n\n", *EVENTS[1:]]).body() == after
        await ended(world)

    run(use, HOSTED, limits=WIDE)


def test_pings_go_on_as_long_as_the_silence() -> None:
    """Each 15 s; and none at all where they are turned off."""

    async def use(world: World) -> int:
        hold = Hold()
        world.provider.answers(Answer(events=[EVENTS[0], hold, *EVENTS[1:]]))
        async with world.asked(stream=True) as response:
            await hold.reached()
            await read(response, size_of(EVENTS, 1))
            for second in range(61):
                world.advance(ms=1000)
                if second % 15 == 14 and world.gateway.settings.ping_after_ms:
                    assert OUR_PING == await read(response, len(OUR_PING))
            hold.release()
            body, _ = await read_to_end(response)
        assert Answer(events=EVENTS[1:]).body() == body
        return len(await ended(world))

    assert 1 == run(use, HOSTED, limits=WIDE)
    assert 1 == run(use, HOSTED, limits=WIDE, ping_after_ms=0)


def test_there_are_no_pings_where_they_would_be_no_events() -> None:
    """Before the head, in JSON, in what is encoded, in refusals, and behind an error that ended the stream."""

    async def use(world: World) -> None:
        body = json.dumps(message(usage=STREAMS["cached"].usage)).encode()
        broken = Answer(events=failing(EVENTS, 3)).body()
        holds = [Hold() for _ in range(4)]
        answers = [
            Answer(events=[body[:9], holds[0], body[9:]], headers={"content-type": "application/json"}),
            Answer(events=[*EVENTS[:2], holds[1], *EVENTS[2:]], encoding="gzip"),
            Answer(events=[EVENTS[0], holds[2], EVENTS[1]], status=500),
            Answer(events=[broken, holds[3]]),
        ]
        for answer, hold in zip(answers, holds, strict=True):
            sent = b"".join(piece for piece in answer.pieces() if isinstance(piece, bytes))
            world.provider.answers(answer)
            async with world.asked(stream=True) as response:
                await hold.reached()
                first = await read(response, world.provider.requests[-1].sent)
                world.advance(ms=20_000)
                world.advance(ms=20_000)
                hold.release()
                rest, complete = await read_to_end(response)
            assert (sent, True) == (first + rest, complete)
        await ended(world, kinds={"settled": 4})

    run(use, HOSTED, limits=WIDE)


def test_there_is_no_ping_before_the_head() -> None:
    """The status of an answer is not known before the provider tells it."""

    async def use(world: World) -> None:
        hold = Hold()
        world.provider.answers(Answer(events=EVENTS, before_head=[hold]))

        async def ask() -> bytes:
            async with world.asked(stream=True) as response:
                return (await read_to_end(response))[0]

        asking = asyncio.create_task(ask())
        await hold.reached()
        world.advance(ms=60_000)
        world.advance(ms=60_000)
        hold.release()

        assert Answer(events=EVENTS).body() == await asking
        await ended(world)

    run(use, HOSTED, limits=WIDE)
