"""However a call ends, it is settled exactly once, holds nothing any more, and the client is told the truth."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

import aiohttp

from meterlib import LedgerEntry, Usage
from meterlib.gateway.call import PING as OUR_PING
from meterlib.gateway.call import Call
from meterlib.gateway.estimate import Estimate
from meterlib.gateway.exchange import ClientGone
from meterlib.gateway.headers import Headers
from meterlib.gateway.prompt import Prompt
from tests.gateway.answers import (
    PATIENCE_S,
    PING,
    STREAMS,
    TEXT,
    Answer,
    Hold,
    Item,
    delta,
    encodings,
    error,
    failing,
    html,
    message,
    redirect,
    said,
    start,
    stream,
)
from tests.gateway.books import WIDE, ended, leave, noticed, read, read_to_end, size_of, told, until
from tests.gateway.world import BASE, HOSTED, LIMITS, PROVIDER_KEY, TOKEN, World, a_world, run
from tests.gateway.world import message as asked

BEGUN: dict[str, Any] = {"input_tokens": 30, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 9000}
EVENTS = stream(usage_start={**BEGUN, "output_tokens": 1}, usage_end={"output_tokens": 21})
BODY = Answer(events=EVENTS).body()
SEEN = -(-len(TEXT) // 4)
CUT, RST = "fin", "rst"
each_break = pytest.mark.parametrize("breaks", [CUT, RST])


def after(count: int) -> int:
    """Where so many events have been sent; less than 0: all but so many."""
    return size_of(EVENTS, count % len(EVENTS) if count < 0 else count)


async def only(world: World) -> LedgerEntry:
    """The entry of the only call there was."""
    (entry,) = await ended(world)
    return entry


# ── The provider fails ────────────────────────────────────────────────────────────────────────────────────────────────


class Cut(NamedTuple):
    """Where a stream breaks off, and what is known by then."""

    name: str
    at: int
    usage: dict[str, Any]
    quality: str


CUTS = [
    Cut("behind the head", 0, {}, "estimated"),
    Cut("inside message_start", after(1) - 9, {}, "estimated"),
    Cut("behind message_start", after(1), {**BEGUN, "output_tokens": 1}, "partial"),
    Cut("behind 16 characters", after(5), {**BEGUN, "output_tokens": 4}, "partial"),
    Cut("inside a character", BODY.index("ñ".encode()) + 1, {**BEGUN, "output_tokens": 4}, "partial"),
    Cut("behind the text", after(-3), {**BEGUN, "output_tokens": SEEN}, "partial"),
    Cut("inside message_delta", after(-2) + 100, {**BEGUN, "output_tokens": SEEN}, "partial"),
    Cut("behind message_delta", after(-1), {**BEGUN, "output_tokens": 21}, "partial"),
    Cut("inside message_stop", after(-1) + 9, {**BEGUN, "output_tokens": 21}, "partial"),
]
each_cut = pytest.mark.parametrize("cut", CUTS, ids=[cut.name for cut in CUTS])


@each_break
@each_cut
def test_a_stream_that_breaks_off_is_no_answer(cut: Cut, breaks: Any) -> None:
    """The client sees that something is missing; what was told until then is booked, and flagged."""

    async def use(world: World) -> None:
        hold = Hold()
        events: list[Item] = [BODY[: cut.at], hold, BODY[cut.at :]]
        world.provider.answers(Answer(events=events, breaks_after=cut.at, breaks=breaks))
        async with world.asked(stream=True) as response:
            await hold.reached()
            first = await read(response, cut.at)
            hold.release()
            rest, complete = await read_to_end(response)
        entry = await only(world)

        assert (BODY[: cut.at], False) == (first + rest, complete)
        assert (cut.quality, cut.usage) == (entry.quality, entry.usage)
        assert ("settled", "cut", "200") == (entry.kind, entry.facts["end"], entry.facts["status"])

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@each_cut
def test_a_clean_end_without_message_stop_is_not_passed_on(cut: Cut, framing: Any) -> None:
    """The SDK for Python would take it for a complete answer, and nobody would know."""
    if cut.at == after(-1):
        return  # all was told but the last event, which adds nothing: see below

    async def use(world: World) -> None:
        world.provider.answers(Answer(events=[BODY[: cut.at]], framing=framing))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (BODY[: cut.at], False) == (got.body, got.whole)
        assert ("cut", cut.usage) == (entry.facts["end"], entry.usage)
        assert cut.quality == entry.quality

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("every", [None, 1, 7])
def test_a_stream_that_lacks_only_its_last_event_is_given_it(framing: Any, every: int | None) -> None:
    """Reason and usage were told, and the connection ended in order. Broken off, clients would ask for all of it again,
    and pay for it twice."""

    async def use(world: World) -> None:
        world.provider.answers(Answer(events=EVENTS[:-1], framing=framing, cut_every=every))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (BODY, True) == (got.body, got.whole)
        assert ("final", {**BEGUN, "output_tokens": 21}) == (entry.quality, entry.usage)
        assert ("complete", "message_stop") == (entry.facts["end"], entry.facts["added"])

    run(use, HOSTED, limits=WIDE)


UNENDED: dict[str, Answer] = {
    "no reason": Answer(events=[*EVENTS[:-2], delta({"output_tokens": 21}, stop_reason=None)]),
    "no usage": Answer(events=[*EVENTS[:-2], delta({})]),
    "no start": Answer(events=EVENTS[1:-1]),
    "broken off": Answer(events=EVENTS, breaks_after=after(-1), breaks="fin"),
    "an error behind it": Answer(events=failing(EVENTS, len(EVENTS) - 1)),
    "text behind it": Answer(events=[*EVENTS[:-1], *said("More", index=1)]),
    "the beginning of text behind it": Answer(events=[*EVENTS[:-1], said("More", index=1)[0]], cut_every=7),
    "half an event behind it": Answer(events=[*EVENTS[:-1], b"event: message_st"]),
    "no end of its line": Answer(events=EVENTS[:-1], open_end=True),
    "compressed": Answer(events=EVENTS[:-1], encoding="gzip"),
}


@pytest.mark.parametrize("what", UNENDED)
def test_no_other_stream_is_given_an_end(what: str) -> None:
    """Where anything else is missing, or might be, nothing is put in its place."""

    async def use(world: World) -> None:
        world.provider.answers(UNENDED[what])
        got = await world.post(stream=True)
        entry = await only(world)

        assert (what == "an error behind it") == got.whole
        assert "added" not in entry.facts
        assert entry.facts["end"] in ("cut", "error_event")
        assert b"message_stop" not in got.body

    run(use, HOSTED, limits=WIDE)


@each_break
def test_what_breaks_behind_message_stop_is_a_complete_answer(breaks: Any) -> None:
    """The client has all there is, and must not pay for it again only since the connection did not end in order."""

    async def use(world: World) -> None:
        hold = Hold()
        world.provider.answers(Answer(events=[*EVENTS, hold, PING], breaks_after=len(BODY), breaks=breaks))
        async with world.asked(stream=True) as response:
            await hold.reached()
            first = await read(response, len(BODY))
            hold.release()
            rest, complete = await read_to_end(response)
        entry = await only(world)

        assert (BODY, True) == (first + rest, complete)
        assert ("final", "complete") == (entry.quality, entry.facts["end"])

    run(use, HOSTED, limits=WIDE)


@each_break
@pytest.mark.parametrize("known", [True, False])
def test_a_plain_answer_that_breaks_off_is_estimated(breaks: Any, known: bool) -> None:
    """Half a JSON document tells nothing, and is no whole answer for the client either."""

    async def use(world: World) -> None:
        document = message(usage=BEGUN)
        world.provider.answers(
            Answer(json=document, breaks_after=100, breaks=breaks, framing="length" if known else "chunked")
        )
        got = await world.post()
        entry = await only(world)

        assert (200, False) == (got.status, got.whole)
        assert ("estimated", {}, "cut") == (entry.quality, entry.usage, entry.facts["end"])

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 529])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_refusal_of_the_provider_passes_and_costs_one_request(status: int, streamed: bool) -> None:
    """Status and body as they are; no token counts, and what was held for them is free again."""

    async def use(world: World) -> None:
        answer = error(status, "prompt is too long: 210000 tokens > 200000 maximum", retry_after=7)
        world.provider.answers(answer)
        got = await world.post(stream=streamed)
        entry = await only(world)

        assert (status, answer.body(), True) == (got.status, got.body, got.whole)
        assert ("7", "req_test_error") == (got.headers["retry-after"], got.headers["request-id"])
        assert ("settled", "final", "refused") == (entry.kind, entry.quality, entry.facts["end"])
        assert (str(status), "req_test_error") == (entry.facts["status"], entry.facts["request_id"])
        assert {0} == set(entry.usage.values())
        assert {"requests": 1, "input_tokens": 0, "output_tokens": 0, "open": 0} == await used(world)

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("closes", [True, False])
def test_a_refusal_may_come_before_the_request_is_read(closes: bool) -> None:
    """A provider that does not want so large a body says so at once."""

    async def use(world: World) -> None:
        answer = replace(error(413), before_body=True, then_closes=closes)
        world.provider.answers(answer)
        body = BytesIO(json.dumps(asked("x" * (6 << 20))).encode())
        async with world.http.post(f"{world.url}/v1/messages", data=body, headers={"x-api-key": TOKEN}) as response:
            got = response.status, await response.read()
        entry = await only(world)

        assert (413, answer.body()) == got
        assert ("final", {0}) == (entry.quality, set(entry.usage.values()))

    run(use, HOSTED, limits=WIDE)


async def used(world: World) -> dict[str, int]:
    return {limit.name: limit.used for limit in await world.meter.peek("acme", {"provider": "anthropic"})}


@pytest.mark.parametrize("events", [1, 4, -3])
@pytest.mark.parametrize("breaks", [None, CUT, RST])
def test_an_error_event_ends_a_stream(events: int, breaks: Any) -> None:
    """It passes as it is; what was seen of the answer until then counts."""

    async def use(world: World) -> None:
        failed = failing(EVENTS, events % len(EVENTS))
        body, hold = Answer(events=failed).body(), Hold()
        world.provider.answers(
            Answer(events=[*failed, hold, PING], breaks_after=len(body), breaks=breaks)
            if breaks
            else Answer(events=[*failed, hold])
        )
        async with world.asked(stream=True) as response:
            await hold.reached()
            first = await read(response, len(body))
            hold.release()
            rest, complete = await read_to_end(response)
        entry = await only(world)

        assert (body, True) == (first + rest, complete)
        assert ("partial", "error_event", 30) == (entry.quality, entry.facts["end"], entry.usage["input_tokens"])

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("instead", [CUT, RST])
def test_no_answer_at_all_is_estimated(instead: Any) -> None:
    """The provider had the call, and may have worked on it: what was held for it stays counted."""

    async def use(world: World) -> None:
        world.provider.answers(Answer(instead=instead))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (502, "api_error") == got.error
        assert ("settled", "estimated", {}) == (entry.kind, entry.quality, entry.usage)
        assert "no_answer" == entry.facts["end"]
        assert got.headers["request-id"] == entry.facts["request_id"]
        assert (await used(world))["input_tokens"] > 0
        assert 1 == len(world.provider.requests), "asked again, though the first may have been worked on"

    run(use, HOSTED, limits=WIDE)


def test_a_provider_that_cannot_be_reached_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was sent: the hold is cancelled, the request included. The operator hears of it, without the key."""

    async def use(world: World) -> None:
        got = await world.post(stream=True)
        await ended(world, kinds={"cancelled": 1})

        assert (502, "api_error") == got.error
        assert {0} == set((await used(world)).values())

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        run(use, HOSTED, limits=WIDE, upstream=f"http://127.0.0.1:{nobody.getsockname()[1]}")
    said = "".join(capsys.readouterr())
    assert "provider.unreachable" in said
    assert PROVIDER_KEY not in said


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
        b"\x00\x01",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ],
    ids=["another protocol", "no status", "an endless head", "bytes", "an upgrade"],
)
def test_what_is_no_http_is_no_answer(raw: bytes) -> None:
    """Whatever listens there is not the provider."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        with suppress(ConnectionError):
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def main() -> None:
        other = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with other:
            await _asked_of(other.sockets[0].getsockname()[1])

    async def _asked_of(port: int) -> None:
        async with a_world(HOSTED, limits=WIDE, upstream=f"http://127.0.0.1:{port}") as world:
            got = await world.post()
            entry = await only(world)

            assert (502, "api_error") == got.error
            assert ("estimated", "no_answer") == (entry.quality, entry.facts["end"])

    asyncio.run(main())


@pytest.mark.parametrize("answer", [html(), Answer(raw=b"", without=["content-type"]), Answer(raw=b"null")])
@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_that_tells_nothing_is_estimated(answer: Answer, streamed: bool) -> None:
    """Such as a login page with status 200: it passes, and what was held stays counted."""

    async def use(world: World) -> None:
        world.provider.answers(answer)
        got = await world.post(stream=streamed)
        entry = await only(world)

        assert (200, answer.body(), True) == (got.status, got.body, got.whole)
        assert ("settled", "estimated", {}) == (entry.kind, entry.quality, entry.usage)

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(events=EVENTS, headers={"content-encoding": "sdch"}),
        Answer(events=EVENTS, headers={"content-encoding": "gzip, br"}),
        *(Answer(events=EVENTS, headers={"content-encoding": name}) for name in ("gzip", "deflate", "br", "zstd")),
    ],
)
def test_what_cannot_be_decoded_passes_all_the_same(answer: Answer) -> None:
    """The client may know better; what the call used is not known, so what was held stays counted."""

    async def use(world: World) -> None:
        world.provider.answers(answer)
        got = await world.post(stream=True)
        entry = await only(world)

        assert (200, BODY, True) == (got.status, got.body, got.whole)
        assert ("estimated", {}) == (entry.quality, entry.usage)

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("encoding", encodings())
def test_what_becomes_unreadable_on_its_way_keeps_what_was_read(encoding: Any) -> None:
    """Bytes that are no such encoding after some that are: the input is known, and the client gets it all."""

    async def use(world: World) -> None:
        whole = Answer(events=EVENTS, encoding=encoding).body()
        events: list[Item] = [EVENTS[0], Hold()]
        begin = next(piece for piece in Answer(events=events, encoding=encoding).pieces() if isinstance(piece, bytes))
        garbage = bytes(range(255, 0, -1)) * 3
        headers = {"content-encoding": encoding}
        world.provider.answers(Answer(events=[begin, garbage], headers=headers))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (begin + garbage, True) == (got.body, got.whole)
        assert whole.startswith(begin)
        assert ("partial", 30) == (entry.quality, entry.usage["input_tokens"])

    run(use, HOSTED, limits=WIDE)


def test_redirects_are_not_followed_and_not_passed_on() -> None:
    """Clients would drop their credential, or send it elsewhere."""

    async def use(world: World) -> None:
        world.provider.answers(redirect("https://elsewhere.example/"))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (502, "api_error") == got.error
        assert ("final", "refused", "307") == (entry.quality, entry.facts["end"], entry.facts["status"])
        assert 1 == len(world.provider.requests)

    run(use, HOSTED, limits=WIDE)


# ── The provider takes too long ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("setting", ["upstream_idle_timeout_ms", "upstream_timeout_ms"])
def test_a_provider_that_does_not_answer_in_time(setting: str) -> None:
    """Clients get a 504; the call was sent, so what was held for it stays counted."""

    async def use(world: World) -> None:
        world.provider.answers(Answer(instead="silence"))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (504, "timeout_error") == got.error
        assert ("estimated", "no_answer") == (entry.quality, entry.facts["end"])
        await world.provider.requests[0].over()

    run(use, HOSTED, limits=WIDE, **{setting: 40})


@pytest.mark.parametrize("setting", ["upstream_idle_timeout_ms", "upstream_timeout_ms"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_provider_that_falls_silent(setting: str, streamed: bool) -> None:
    """Clients see a broken answer, and its connection is given up."""

    async def use(world: World) -> None:
        hold = Hold()
        headers = {} if streamed else {"content-type": "application/json"}
        world.provider.answers(Answer(events=[BODY[: after(4)], hold, BODY[after(4) :]], headers=headers))
        got = await world.post(stream=streamed)
        entry = await only(world)

        assert (BODY[: after(4)], False) == (got.body, got.whole)
        assert ("partial" if streamed else "estimated", "cut") == (entry.quality, entry.facts["end"])
        await world.provider.requests[0].over()
        assert world.provider.requests[0].hung_up

    run(use, HOSTED, limits=WIDE, **{setting: 60})


# ── The client leaves ─────────────────────────────────────────────────────────────────────────────────────────────────


class Leaving(NamedTuple):
    """A client that left in the middle of a stream, and what holds the rest of that back."""

    hold: Hold
    seen: bytes


@asynccontextmanager
async def left_at(world: World, at: int, *, reset: bool = False) -> AsyncIterator[Leaving]:
    """A client that has gone away after so many bytes, when the gateway has seen it."""
    hold = Hold()
    world.provider.answers(Answer(events=[BODY[:at], hold, BODY[at:]]))
    async with world.asked(stream=True) as response:
        await hold.reached()
        seen = await read(response, at)
        leave(response, reset=reset)
        await noticed(world)
        yield Leaving(hold, seen)


@asynccontextmanager
async def left_before_the_head(world: World, answer: Answer) -> AsyncIterator[None]:
    """A client that has gone away before there was any answer."""
    world.provider.answers(answer)
    asking = asyncio.create_task(world.post(stream=answer.json is None))
    await world.provider.arrived()
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    await noticed(world)
    yield


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@each_cut
def test_an_answer_without_reader_is_drained(cut: Cut, reset: bool) -> None:
    """Hosted: the provider is read to its end, so that the numbers are its own."""

    async def use(world: World) -> None:
        async with left_at(world, cut.at, reset=reset) as leaving:
            assert 1 == world.gateway.open_calls
            leaving.hold.release()
            entry = await only(world)

        assert ("final", "complete", "gone") == (entry.quality, entry.facts["end"], entry.facts["client"])
        assert told({**BEGUN, "output_tokens": 21}) == entry.usage
        assert world.provider.requests[0].hung_up is None
        assert len(BODY) == world.provider.requests[0].sent

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@each_cut
def test_an_answer_without_reader_is_given_up(cut: Cut, reset: bool) -> None:
    """Own key: the input is exact as soon as it was told, and what was seen of the output is the least it can be."""

    async def use(world: World) -> None:
        async with left_at(world, cut.at, reset=reset):
            entry = await only(world)
            await world.provider.requests[0].over()

        assert (cut.quality, cut.usage) == (entry.quality, entry.usage)
        assert ("client_gone", "gone") == (entry.facts["end"], entry.facts["client"])
        assert world.provider.requests[0].hung_up
        assert cut.at == world.provider.requests[0].hung_up_after

    run(use, HOSTED, limits=WIDE, on_disconnect="cancel")


def test_a_client_that_leaves_when_all_was_sent_changes_nothing() -> None:
    """Whether it waited for the last byte is its own affair."""

    async def use(world: World) -> None:
        async with left_at(world, len(BODY)) as leaving:
            leaving.hold.release()
            entry = await only(world)

        assert ("final", told({**BEGUN, "output_tokens": 21})) == (entry.quality, entry.usage)

    run(use, HOSTED, limits=WIDE)
    run(use, HOSTED, limits=WIDE, on_disconnect="cancel")


def test_draining_has_an_end() -> None:
    """Until `drain_ms` is over the answer is read on; then what is known counts."""

    async def use(world: World) -> None:
        async with left_at(world, after(4)):
            world.advance(ms=2999)
            assert 1 == world.gateway.open_calls
            assert 1 == await world.open_reservations()
            world.advance(ms=1)
            entry = await only(world)
            await world.provider.requests[0].over()

        assert ("partial", "client_gone", 30) == (entry.quality, entry.facts["end"], entry.usage["input_tokens"])
        assert world.provider.requests[0].hung_up

    run(use, HOSTED, limits=WIDE, drain_ms=3000)


def test_draining_ends_also_while_the_provider_goes_on() -> None:
    """A provider that never falls silent does not keep the call alive."""

    async def use(world: World) -> None:
        hold, more = Hold(), Hold()
        world.provider.answers(Answer(events=[BODY[: after(4)], hold, BODY[after(4) : after(5)], more]))
        async with world.asked(stream=True) as response:
            await read(response, after(4))
            await hold.reached()
            leave(response)
            await noticed(world)
        world.clock.advance(ms=3000)
        hold.release()
        entry = await only(world)

        assert ("partial", "client_gone", 4) == (entry.quality, entry.facts["end"], entry.usage["output_tokens"])

    run(use, HOSTED, limits=WIDE, drain_ms=3000)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_left_before_the_head_is_drained_too(streamed: bool) -> None:
    """Nothing is known yet, so the answer is waited for."""

    async def use(world: World) -> None:
        hold = Hold()
        usage = {**BEGUN, "output_tokens": 21}
        answer = Answer(events=EVENTS, before_head=[hold])
        plain = Answer(json=message(usage=usage), before_head=[hold])
        async with left_before_the_head(world, answer if streamed else plain):
            hold.release()
            entry = await only(world)

        assert ("final", told(usage), "gone") == (entry.quality, entry.usage, entry.facts["client"])

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_left_before_the_head_is_estimated_if_nobody_drains(streamed: bool) -> None:
    """Nothing is known and nothing will be: what was held stays counted."""

    async def use(world: World) -> None:
        hold = Hold()
        answer = Answer(events=EVENTS, before_head=[hold])
        plain = Answer(json=message(usage=BEGUN), before_head=[hold])
        async with left_before_the_head(world, answer if streamed else plain):
            entry = await only(world)
            await world.provider.requests[0].over()

        assert ("estimated", {}, "client_gone") == (entry.quality, entry.usage, entry.facts["end"])
        assert world.provider.requests[0].hung_up

    run(use, HOSTED, limits=WIDE, on_disconnect="cancel")


def test_a_plain_answer_that_came_in_full_is_known_also_when_its_reader_left() -> None:
    """Though nobody drains, what has been read was read."""

    async def use(world: World) -> None:
        hold, usage = Hold(), {**BEGUN, "output_tokens": 21}
        world.provider.answers(Answer(json=message(usage=usage), before_head=[hold]))
        asking = asyncio.create_task(world.post())
        await world.provider.arrived()
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await until(lambda: all(call._exchange.gone for call in world.gateway._calls))
        hold.release()
        entry = await only(world)

        assert ("final", told(usage)) == (entry.quality, entry.usage)

    run(use, HOSTED, limits=WIDE, on_disconnect="cancel")


def test_a_connection_that_was_given_up_is_never_used_again() -> None:
    """What is left on it would be taken for the next answer."""

    async def use(world: World) -> None:
        for _ in range(5):
            async with left_at(world, after(4)):
                await until(lambda: not world.gateway.open_calls)
            usage = {"input_tokens": 7, "output_tokens": 5}
            world.provider.answers(Answer(json=message(usage=usage)))
            assert message(usage=usage) == (await world.post()).json
        connections = [request.connection for request in world.provider.requests]
        for number, given_up in enumerate(connections[::2]):
            assert given_up not in connections[2 * number + 1 :]
        await until(lambda: world.provider.open_connections <= 1)
        await ended(world, kinds={"settled": 10})

    run(use, HOSTED, limits=WIDE, on_disconnect="cancel")


async def ask_by_hand(world: World, client: socket.socket, version: str = "1.1") -> None:
    """Send a request for a stream over a connection of the test's own."""
    body = json.dumps(asked(stream=True)).encode()
    lines = [
        f"POST {BASE}/v1/messages HTTP/{version}",
        "host: x",
        f"x-api-key: {TOKEN}",
        f"content-length: {len(body)}",
    ]
    host, port = world.url.split("/")[2].split(":")
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (host, int(port)))
    await loop.sock_sendall(client, "\r\n".join([*lines, "", ""]).encode() + body)


@pytest.mark.parametrize("complete", [True, False])
def test_clients_that_speak_http_1_0_see_what_is_missing(complete: bool) -> None:
    """To them the end of the connection is the end of the answer; nginx speaks so to what is behind it."""

    async def use(world: World) -> None:
        hold = Hold()
        world.provider.answers(Answer(events=[BODY[: after(4)], hold, BODY[after(4) : None if complete else after(5)]]))
        loop, got = asyncio.get_running_loop(), b""
        with socket.socket() as client:
            await ask_by_hand(world, client, "1.0")
            await hold.reached()
            while b"Na" not in got:
                got += await loop.sock_recv(client, 65_536)
            hold.release()
            broken = False
            try:
                while piece := await loop.sock_recv(client, 65_536):
                    got += piece
            except ConnectionResetError:
                broken = True
        await ended(world, kinds={"settled": 1})

        assert broken is not complete
        if complete:
            assert BODY == got.partition(b"\r\n\r\n")[2]

    run(use, HOSTED, limits=WIDE)


# ── The client does not read ──────────────────────────────────────────────────────────────────────────────────────────

LONG = [start({**BEGUN, "output_tokens": 1}), *said("x" * (24 << 20), characters=1 << 19), delta({"output_tokens": 5})]


@asynccontextmanager
async def stalled(world: World, answer: Answer) -> AsyncIterator[Call]:
    """A client that asks for a stream and then reads nothing; the call that cannot go on for that reason."""
    world.provider.answers(answer)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await ask_by_hand(world, client)
        await until(lambda: world.gateway.open_calls)
        (call,) = world.gateway._calls
        await _stands_still(world, call)
        yield call


async def _stands_still(world: World, call: Call) -> None:
    """Wait until nothing moves any more: not one byte within many rounds of the event loop."""
    request, still = await world.provider.arrived(), 0
    before = -1
    async with asyncio.timeout(20):
        while still < 60:
            still = still + 1 if call._writing_s is not None and before == request.sent else 0
            before = request.sent
            await asyncio.sleep(0.001)


def test_a_slow_reader_slows_the_provider_down() -> None:
    """What waits for it does not pile up in the gateway: the provider is read only as fast as the client reads."""

    async def use(world: World) -> None:
        answer = Answer(events=LONG)
        async with stalled(world, answer) as call:
            transport: Any = call._exchange._request.transport  # type: ignore[attr-defined]

            assert world.provider.requests[0].sent < len(answer.body()) - (4 << 20)
            assert transport.get_write_buffer_size() < 2 << 20
        await ended(world, kinds={"settled": 1})

    run(use, HOSTED, limits=WIDE, on_disconnect="cancel")


@pytest.mark.parametrize("drains", [True, False])
def test_a_client_that_reads_nothing_is_dropped(drains: bool) -> None:
    """After `write_timeout_ms`; then it counts as one that left."""

    async def use(world: World) -> None:
        async with stalled(world, Answer(events=[*LONG, {"type": "message_stop"}])):
            world.advance(ms=59_999)
            assert 1 == world.gateway.open_calls
            world.advance(ms=1)
            await until(lambda: all(call._exchange.gone for call in world.gateway._calls))
            world.advance(ms=0)
            entry = await only(world)

        assert "gone" == entry.facts["client"]
        assert ("final" if drains else "partial") == entry.quality
        assert 30 == entry.usage["input_tokens"]

    run(use, HOSTED, limits=WIDE, on_disconnect="drain" if drains else "cancel")


def test_a_connection_that_is_closed_does_not_wait_for_its_reader() -> None:
    """What is still to be sent keeps a connection open only for so long."""

    async def use(world: World) -> None:
        hold = Hold()
        async with stalled(world, Answer(events=[*LONG, hold, {"type": "message_stop"}])):
            world.gateway.stop_now()
            await ended(world, kinds={"settled": 1})
            assert 1 == len(world.server._connections.connections)
            await until(lambda: not world.server._connections.connections)

    run(use, HOSTED, limits=WIDE, write_timeout_ms=200)


class Reader:
    """A client as a server's face shows it to the gateway; it takes what it is given, but for one step."""

    method, path, query, request_id = "POST", f"{BASE}/v1/messages", "", "req_of_the_gateway"
    headers: Headers = (("x-api-key", TOKEN), ("content-type", "application/json"))

    def __init__(self, refuses: Callable[[str, bytes], bool] = lambda step, data: False) -> None:
        self.started = self.gone = self.finished = self.closed = False
        self.got = b""
        self.blocked = asyncio.Event()
        self._refuses = refuses
        self._dropped = asyncio.Event()

    async def body(self, bytes_max: int, timeout_ms: int) -> bytes:
        return json.dumps(asked(stream=True)).encode()

    async def start(self, status: int, headers: Headers, *, more: bool = False) -> None:
        self.started = True
        await self._step("start")

    async def write(self, data: bytes) -> None:
        assert not self.finished
        await self._step("write", data)
        self.got += data

    async def finish(self) -> None:
        await self._step("finish")
        self.finished = True

    def close(self) -> None:
        self.gone = self.closed = True

    def abort(self) -> None:
        self.gone = True
        self._dropped.set()

    async def _step(self, step: str, data: bytes = b"") -> None:
        if not self.gone and self._refuses(step, data):
            self.blocked.set()
            await self._dropped.wait()
        if self.gone:
            raise ClientGone


STEPS: list[tuple[str, Callable[[str, bytes], bool]]] = [
    ("its head", lambda step, data: step == "start"),
    ("its first piece", lambda step, data: step == "write"),
    ("its last piece", lambda step, data: b"message_stop" in data),
    ("its end", lambda step, data: step == "finish"),
    ("a ping", lambda step, data: data == OUR_PING),
]
each_step = pytest.mark.parametrize("refuses", [step for _, step in STEPS], ids=[name for name, _ in STEPS])


@asynccontextmanager
async def blocked(world: World, refuses: Callable[[str, bytes], bool]) -> AsyncIterator[Reader]:
    """A reader that has stopped reading, in the middle of a call."""
    hold, reader = Hold(), Reader(refuses)
    events = [event for event in EVENTS if event != PING]  # the only ping is ours
    world.provider.answers(Answer(events=[*events[:3], hold, *events[3:]]))
    handling = asyncio.create_task(world.gateway.handle(reader))
    if refuses("write", OUR_PING) and not refuses("write", b"x"):
        await hold.reached()
        await until(partial(_has, reader, size_of(events, 3)))
        world.advance(ms=15_000)
    hold.release()
    async with asyncio.timeout(PATIENCE_S):
        await reader.blocked.wait()
    yield reader
    async with asyncio.timeout(PATIENCE_S):
        await handling


@each_step
@pytest.mark.parametrize("drains", [True, False])
def test_whatever_a_client_does_not_take_it_is_dropped_in_time(
    refuses: Callable[[str, bytes], bool], drains: bool
) -> None:
    """Also the very end of its answer: nothing of a call is kept for ever."""

    async def use(world: World) -> None:
        async with blocked(world, refuses) as reader:
            for _ in range(50):
                await asyncio.sleep(0)
            world.advance(ms=59_999)
            assert (1, False) == (world.gateway.open_calls, reader.gone)
            world.advance(ms=1)
            assert reader.gone
        entry = await only(world)

        assert ("final" if drains or refuses("finish", b"") else entry.quality) == entry.quality
        assert reader.finished is False

    run(use, HOSTED, limits=WIDE, on_disconnect="drain" if drains else "cancel")


@each_step
def test_a_gateway_that_stops_waits_for_no_client(refuses: Callable[[str, bytes], bool]) -> None:
    """Whatever it is that a client does not take: the call is settled, and its task ends."""

    async def use(world: World) -> None:
        before = asyncio.all_tasks()
        async with blocked(world, refuses) as reader:
            world.gateway.stop_now()
            world.gateway.stop_now()
        entry = await only(world)
        await until(lambda: before >= asyncio.all_tasks() - _of_servers())

        assert reader.closed
        assert ("complete" if refuses("finish", b"") else "shutdown") == entry.facts["end"]

    run(use, HOSTED, limits=WIDE)


def _has(reader: Reader, size: int) -> bool:
    return len(reader.got) == size


def _of_servers() -> set[asyncio.Task[Any]]:
    """Tasks that serve connections, which may stay open."""
    return {task for task in asyncio.all_tasks() if "_serve" in repr(task.get_coro())}


def test_pings_and_pieces_keep_their_order() -> None:
    """While a ping is on its way, the piece that comes next waits for it."""

    async def use(world: World) -> None:
        for count in range(1, len(EVENTS)):
            hold, reader = Hold(), Reader()
            world.provider.answers(Answer(events=[*EVENTS[:count], hold, *EVENTS[count:]]))
            handling = asyncio.create_task(world.gateway.handle(reader))
            await hold.reached()
            await until(partial(_has, reader, after(count)))
            hold.release()
            world.advance(ms=15_000)
            await handling

            assert BODY[: after(count)] + OUR_PING + BODY[after(count) :] == reader.got
            assert reader.finished
        await ended(world)

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("last", [failing(EVENTS, 3), EVENTS[:-2]], ids=["an error", "no end"])
def test_a_ping_never_comes_after_the_end(last: list[Any]) -> None:
    """A stream that has just ended is not kept alive, and nothing is written behind it."""

    async def use(world: World) -> None:
        hold, reader = Hold(), Reader()
        body = Answer(events=last).body()
        world.provider.answers(Answer(events=[body, hold]))
        handling = asyncio.create_task(world.gateway.handle(reader))
        await hold.reached()
        await until(lambda: len(reader.got) == len(body))
        failed = "error" in last[-1]["type"]
        while not handling.done():
            hold.release()
            if failed or reader.closed or world.gateway._background:
                world.advance(ms=15_000)
            await asyncio.sleep(0)
        await handling

        assert body == reader.got
        assert (failed, not failed) == (reader.finished, reader.closed)
        await ended(world)

    run(use, HOSTED, limits=WIDE, drain_ms=86_400_000, lease_ms=86_400_000)


# ── Metering fails ────────────────────────────────────────────────────────────────────────────────────────────────────


class Forgetful:
    """An estimator that somebody else wrote."""

    def estimate(self, tenant: str, prompt: Prompt) -> Estimate:
        return Estimate(usage=Usage(input_tokens=50))

    def learn(self, estimate: Estimate, usage: Usage) -> None:
        raise KeyError("what was it?")


def test_an_estimator_that_fails_keeps_nothing_from_being_settled() -> None:
    """Neither the client nor the ledger hears of it."""

    async def use(world: World) -> None:
        world.gateway._admission._estimator = Forgetful()
        world.provider.answers(Answer(events=EVENTS))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (BODY, True) == (got.body, got.whole)
        assert ("final", told({**BEGUN, "output_tokens": 21})) == (entry.quality, entry.usage)

    run(use, HOSTED, limits=WIDE)


@given(
    body=st.binary(max_size=3000) | st.sampled_from([BODY, b"", b"{}"]),
    encoding=st.sampled_from([None, "gzip", "deflate", "br", "zstd", "x-gzip", "identity", "GZIP ", ","]),
    kind=st.sampled_from(["text/event-stream", "application/json", "text/html", "TEXT/event-stream; charset=x", ";"]),
    every=st.sampled_from([None, 1, 100]),
)
@example(body=b"[" * 100_000, encoding=None, kind="application/json", every=None)
@example(
    body=b'data: {"type":"message_start","message":' + b"[" * 90_000, encoding=None, kind="text/event-stream", every=7
)
@settings(max_examples=60)
def test_no_bytes_keep_a_call_from_its_end(body: bytes, encoding: str | None, kind: str, every: int | None) -> None:
    """Whatever a provider sends and calls it: the client has the same, and the call is settled."""

    async def use(world: World) -> None:
        headers = {"content-type": kind} | ({"content-encoding": encoding} if encoding else {})
        world.provider.answers(Answer(raw=body, headers=headers, cut_every=every))
        got = await world.post(stream=True)
        entry = await only(world)

        assert (200, body) == (got.status, got.body)
        assert got.whole == (entry.facts["end"] != "cut")

    run(use, HOSTED, limits=WIDE)


# ── Many at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Script(NamedTuple):
    """One call: what the provider sends, and when client or provider go away."""

    name: str
    encoding: Any
    line_end: Any
    cut_every: int | None
    breaks_after: int | None
    breaks: Any
    leaves_after: int | None
    reset: bool

    @property
    def answer(self) -> Answer:
        return Answer(
            events=STREAMS[self.name].events,
            encoding=self.encoding,
            line_end=self.line_end,
            cut_every=self.cut_every,
            breaks_after=self.breaks_after,
            breaks=self.breaks,
        )

    @property
    def input_known_after(self) -> int:
        """How many bytes it takes to tell the input."""
        whole = Answer(events=STREAMS[self.name].events, encoding=self.encoding, line_end=self.line_end)
        return len(next(piece for piece in whole.pieces() if isinstance(piece, bytes)))

    async def plays(self, world: World) -> int:
        """What a client does; returns how many bytes it had."""
        async with world.asked(stream=True, system=json.dumps(self._replace(name=self.name))) as response:
            got = 0
            with suppress(aiohttp.ClientError):
                while self.leaves_after is None or got < self.leaves_after:
                    piece = await response.content.readany()
                    if not piece:
                        return got
                    got += len(piece)
            if self.leaves_after is not None and got >= self.leaves_after:
                leave(response, reset=self.reset)
            return got


scripts = st.builds(
    Script,
    name=st.sampled_from(sorted(STREAMS)),
    encoding=st.sampled_from([None, *encodings()]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    cut_every=st.sampled_from([None, 3, 50, 1000]),
    breaks_after=st.none() | st.integers(0, 2500),
    breaks=st.sampled_from([CUT, RST]),
    leaves_after=st.none() | st.integers(0, 2500),
    reset=st.booleans(),
)


async def play(world: World, calls: list[Script], chance: random.Random) -> None:
    """All of them at once; then everything agrees, and each call was booked as what it was."""
    waiting = {json.dumps(call): call for call in calls}
    world.provider.answers_always(lambda request: waiting[request.json()["system"]].answer)
    order = list(calls)
    chance.shuffle(order)
    playing = [asyncio.create_task(call.plays(world)) for call in order]
    while not all(task.done() for task in playing) or world.gateway.open_calls:
        world.gateway.tend()
        await asyncio.sleep(0.001)
    had = {json.dumps(call): task.result() for call, task in zip(order, playing, strict=True)}
    entries = await ended(world, kinds={"settled": len(calls)})
    by_id = {entry.facts["request_id"]: entry for entry in entries}
    for request in world.provider.requests:
        script = request.json()["system"]
        _check(waiting[script], by_id[f"req_test_{request.number:06}"], request.sent, had[script])


def _check(call: Script, entry: LedgerEntry, sent: int, had: int) -> None:
    usage, whole = STREAMS[call.name].usage, len(call.answer.body())
    begun = STREAMS[call.name].events[0]["message"]["usage"]
    broken = call.breaks_after is not None and call.breaks_after < whole
    if entry.quality in ("final", "split_unknown") or (not broken and entry.facts["end"] == "complete"):
        assert told(usage) == entry.usage
    if had >= call.input_known_after or (entry.facts["end"] == "cut" and sent >= call.input_known_after):
        assert entry.usage["input_tokens"] in (begun["input_tokens"], usage["input_tokens"])
        assert entry.quality != "estimated"
    if call.leaves_after is None and not broken:
        assert "complete" == entry.facts["end"]
        assert entry.quality in ("final", "split_unknown")


@given(calls=st.lists(scripts, min_size=1, max_size=8, unique=True), seed=st.integers(0, 99), drains=st.booleans())
@settings(max_examples=40)
def test_every_call_ends_once(calls: list[Script], seed: int, drains: bool) -> None:
    """However it is cut, encoded, broken off or left: one entry, with the exact input as soon as that was told."""
    on_disconnect = "drain" if drains else "cancel"
    run(lambda world: play(world, calls, random.Random(seed)), HOSTED, limits=WIDE, on_disconnect=on_disconnect)


@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
def test_fifty_streams_at_once_of_which_many_are_left(on_disconnect: str) -> None:
    """Nothing stays reserved, and the totals are exact."""
    chance = random.Random(50)
    calls = [
        Script(
            name=chance.choice(sorted(STREAMS)),
            encoding=None,
            line_end="\n",
            cut_every=100 + number,
            breaks_after=chance.choice([None, None, None, chance.randrange(2000)]),
            breaks=chance.choice([CUT, RST]),
            leaves_after=chance.choice([None, None, chance.randrange(2000)]),
            reset=chance.random() < 0.5,
        )
        for number in range(50)
    ]
    run(lambda world: play(world, calls, chance), HOSTED, limits=WIDE, on_disconnect=on_disconnect)


@pytest.mark.parametrize("breaks_after", [None, 60])
def test_a_plain_answer_whose_end_is_that_of_its_connection_is_whole_only_if_it_can_be_read(
    breaks_after: int | None,
) -> None:
    """Half a JSON document is not passed off as an answer, though nothing else tells that it is half."""

    async def use(world: World) -> None:
        told_whole = message(usage={"input_tokens": 12, "output_tokens": 3})
        world.provider.answers(Answer(json=told_whole, framing="close", breaks_after=breaks_after, breaks="fin"))

        got = await world.post()

        entry = await world.entry()
        if breaks_after is None:
            assert (True, "complete", "final") == (got.whole, entry.facts["end"], entry.quality)
        else:
            assert (False, "cut", "estimated") == (got.whole, entry.facts["end"], entry.quality)

    run(use, HOSTED, limits=LIMITS)


def test_a_cut_stream_teaches_the_estimator_its_input() -> None:
    """What the start of a stream tells is exact, and an agent's next turn is estimated by it."""

    async def use(world: World) -> None:
        learnt: list[int | None] = []
        estimator = world.gateway._admission._estimator
        estimator.learn = lambda estimate, usage: learnt.append(usage.input_tokens)  # type: ignore[method-assign]
        world.provider.answers(Answer(events=STREAMS["cached"].events[:4], breaks_after=100_000))

        await world.post(stream=True)
        await world.settled()

        assert [11] == learnt

    run(use, HOSTED, limits=LIMITS)
