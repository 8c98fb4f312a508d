"""What an answer says of its usage depends on its bytes alone: not on how they were cut, nor on their line ends."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib.core.usage import CacheCreation, Iteration, OutputTokensDetails, ServerToolUse, Usage
from meterlib.gateway.sse import Event, EventDecoder, UsageStream, quality_of, usage_of

# ── Helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def wire(*events: Mapping[str, Any], end: str = "\n") -> bytes:
    """Events as the Claude API sends them."""
    lines = [f"event: {event['type']}{end}data: {json.dumps(event, ensure_ascii=False)}{end}{end}" for event in events]
    return "".join(lines).encode()


def start(model: str = "claude-sonnet-4-5", /, **usage: Any) -> dict[str, Any]:
    return {"type": "message_start", "message": {"id": "msg_1", "role": "assistant", "model": model, "usage": usage}}


def delta(**usage: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}


def content(**delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": delta}


def text(shown: str) -> dict[str, Any]:
    return content(type="text_delta", text=shown)


STOP: dict[str, Any] = {"type": "message_stop"}
ERROR: dict[str, Any] = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


def read(stream: bytes, cuts: Sequence[int] = ()) -> UsageStream:
    usage_stream = UsageStream()
    for piece in pieces(stream, cuts):
        usage_stream.feed(piece)
    usage_stream.end()
    return usage_stream


def told_by(*events: Mapping[str, Any]) -> UsageStream:
    return read(wire(*events))


def pieces(stream: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def decode(stream: bytes, cuts: Sequence[int] = (), event_bytes_max: int = 1 << 20) -> tuple[list[Event], int]:
    decoder = EventDecoder(event_bytes_max)
    events = [event for piece in pieces(stream, cuts) for event in decoder.feed(piece)]
    return events + decoder.end(), decoder.oversized


def state(stream: UsageStream) -> tuple[Any, ...]:
    return stream.usage, stream.quality, stream.started, stream.finished, stream.error, stream.model


# ── The stream's grammar ──────────────────────────────────────────────────────────────────────────────────────────────

fragments = st.sampled_from(
    [
        b"data",
        b"event",
        b":",
        b": ",
        b" ",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"x",
        b"{}",
        "\u2028é🙂".encode(),
        b"\xef\xbb\xbf",
    ]
)
streams = st.lists(fragments, max_size=40).map(b"".join)
cut_lists = st.lists(st.integers(min_value=0, max_value=10_000), max_size=12)


@given(stream=streams, cuts=cut_lists, event_bytes_max=st.integers(min_value=8, max_value=40))
def test_how_a_stream_is_cut_never_changes_its_events(stream: bytes, cuts: list[int], event_bytes_max: int) -> None:
    """Networks cut where they like: between CR and LF, inside a character, in the middle of a line that is too long."""
    whole = decode(stream, (), event_bytes_max)

    assert whole == decode(stream, cuts, event_bytes_max)
    assert whole == decode(stream, range(len(stream)), event_bytes_max)


@given(
    events=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1),
            st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))).map("\n".join),
        )
    ),
    line_end=st.sampled_from(["\n", "\r", "\r\n"]),
    space=st.sampled_from(["", " "]),
    cuts=cut_lists,
)
def test_what_was_written_is_read(events: list[tuple[str, str]], line_end: str, space: str, cuts: list[int]) -> None:
    """Any line end, with or without the space, with comments in between."""
    space_of = {value: " " if value.startswith(" ") else space for _, data in events for value in data.split("\n")}
    stream = "".join(
        f": {name}{line_end}event: {name}{line_end}"
        + "".join(f"data:{space_of[value]}{value}{line_end}" for value in data.split("\n"))
        + line_end
        for name, data in events
    ).encode()

    assert [(name, data.encode()) for name, data in events] == decode(stream, cuts)[0]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"event: a\ndata: 1\n\n", [("a", b"1")]),
        (b"event:a\ndata:1\n\n", [("a", b"1")]),
        (b"event: a\ndata:  1\n\n", [("a", b" 1")]),
        (b"data: 1\n\n", [("message", b"1")]),
        (b"data: 1\ndata: 2\ndata\n\n", [("message", b"1\n2\n")]),
        (b"event: a\rdata: 1\r\revent: b\r\ndata: 2\r\n\r\n", [("a", b"1"), ("b", b"2")]),
        (b": hello\n\n:\ndata: 1\n:data: 2\n\n", [("message", b"1")]),
        (b"event: a\n\ndata: 1\n\n", [("message", b"1")]),
        (b"id: 7\nretry: 10\nevent: a\ndata: 1\n\n", [("a", b"1")]),
        (b"\xef\xbb\xbfdata: 1\n\n", [("message", b"1")]),
        (b"event: a\ndata: 1", [("a", b"1")]),
        (b"event: a\ndata: 1\n", [("a", b"1")]),
        (b"event: a\ndata: 1\r", [("a", b"1")]),
        ('data: "\u2028"\n\n'.encode(), [("message", '"\u2028"'.encode())]),
        (b"\n\n\r\n\r\r", []),
        (b"", []),
    ],
)
def test_the_grammar(stream: bytes, events: list[tuple[str, bytes]]) -> None:
    """Event streams as they are written in the wild."""
    assert (events, 0) == decode(stream)
    assert (events, 0) == decode(stream, range(len(stream)))


def test_an_event_too_large_is_left_out_and_the_next_one_is_read() -> None:
    """One monstrous event costs neither memory nor the events after it."""
    decoder = EventDecoder(event_bytes_max=100)
    decoder.feed(b"event: a\ndata: ")
    for _ in range(1000):
        decoder.feed(b"x" * 1000)
        assert len(decoder._line) < 200

    assert decoder.feed(b"\n\nevent: b\ndata: 2\n\n") == [("b", b"2")]
    assert decoder.oversized == 1


def test_comments_may_be_of_any_length() -> None:
    """What keeps a connection alive never counts towards the size of an event."""
    stream = b":" + b"x" * 1000 + b"\n" + b": x\n" * 1000 + b"data: 1\n\n"

    assert decode(stream, (), 50) == ([("message", b"1")], 0)
    assert decode(stream, range(len(stream)), 50) == ([("message", b"1")], 0)


# ── How a stream's numbers add up ─────────────────────────────────────────────────────────────────────────────────────

counts = st.none() | st.integers(min_value=0, max_value=50_000)
usages = st.fixed_dictionaries(
    {},
    optional={
        "input_tokens": counts,
        "cache_creation_input_tokens": counts,
        "cache_read_input_tokens": counts,
        "output_tokens": counts,
        "service_tier": st.sampled_from([None, "standard", "priority"]),
        "server_tool_use": st.none() | st.fixed_dictionaries({"web_search_requests": counts}),
    },
)
events = (
    usages.map(lambda usage: start(**usage))
    | usages.map(lambda usage: delta(**usage))
    | st.text(max_size=30).map(text)
    | st.sampled_from([STOP, ERROR, {"type": "ping"}, {"type": "future_event", "usage": {"output_tokens": 99}}])
)


@given(
    events=st.lists(events, max_size=12),
    line_end=st.sampled_from(["\n", "\r", "\r\n"]),
    tail=st.integers(min_value=0, max_value=30),
    cuts=cut_lists,
)
def test_how_a_stream_is_cut_never_changes_its_usage(
    events: list[dict[str, Any]], line_end: str, tail: int, cuts: list[int]
) -> None:
    """The same bytes, whole or in pieces, finished or broken off, are the same usage."""
    stream = wire(*events, end=line_end)
    stream = stream[: len(stream) - tail]

    assert state(read(stream)) == state(read(stream, cuts))


ways_to_write = st.sampled_from(
    [
        "event: {name}\ndata: {data}\n\n",
        "event: {name}\ndata: {data}\n\n",
        "event:{name}\ndata:{data}\n\n",
        "data: {data}\nevent: {name}\n\n",
        "data: {data}\nevent: {name}\ndata: \n\n",
        "data: {data}\n\n",
        "event: {name}\n: well\ndata: {data}\n\n",
        "event: {name}\nid: 1\ndata: {data}\n\n\n",
        "event: {name}\r\ndata: {data}\r\n\r\n",
        "event: {name}\ndata: {data}\r\n\n",
        "event: {name}\ndata: {data}\r\r",
        ": nothing\n\nevent: {name}\ndata: {data}\n\n",
        "\ufeffevent: {name}\ndata: {data}\n\n",
    ]
)


@given(written=st.lists(st.tuples(events, ways_to_write), max_size=12), cuts=cut_lists)
def test_how_events_are_written_is_no_matter(written: list[tuple[dict[str, Any], str]], cuts: list[int]) -> None:
    """Most are read at a glance, in the way that the provider writes them. Those between them must not suffer from it.

    Byte by byte, none comes in one piece, and each is read the long way.
    """
    stream = "".join([way.format(name=event["type"], data=json.dumps(event)) for event, way in written]).encode()
    long_way = read(stream, range(len(stream)))

    assert state(long_way) == state(read(stream)) == state(read(stream, cuts))
    assert long_way.concluded == read(stream).concluded == read(stream, cuts).concluded


@pytest.mark.parametrize("in_bytes", [False, True])
def test_text_behind_what_looked_like_the_end_shows_that_it_was_not(in_bytes: bool) -> None:
    """An answer is only given the end that it lacks if nothing came behind its numbers."""
    concluded, goes_on = wire(start(input_tokens=1), delta(output_tokens=1)), wire(text("more"))

    assert read(concluded).concluded
    assert not read(concluded + goes_on, range(500) if in_bytes else ()).concluded


def test_what_looks_like_an_event_may_be_the_rest_of_one() -> None:
    """A network may cut where its second half has all that a whole one has."""
    first, rest = b"data: %b\n" % json.dumps(start(input_tokens=5)).encode(), b"event: message_start\ndata: \n\n"

    for cuts in ([], [len(first)]):
        usage_stream = UsageStream()
        for piece in pieces(first + rest, cuts):
            usage_stream.feed(piece)

        assert (True, 5) == (usage_stream.between_events, usage_stream.usage.input_tokens)


@pytest.mark.parametrize("in_bytes", [False, True])
def test_a_start_that_is_too_large_is_left_out_however_it_comes(in_bytes: bool) -> None:
    """Nobody is to make the gateway read what is larger than anything real."""
    stream = wire(start("m" * 300, input_tokens=1), {"type": "ping"}, delta(output_tokens=7))
    usage_stream = UsageStream(event_bytes_max=250)
    for piece in pieces(stream, range(len(stream)) if in_bytes else ()):
        usage_stream.feed(piece)

    assert (False, 7) == (usage_stream.started, usage_stream.usage.output_tokens)


@given(stream=streams | st.binary(), cuts=cut_lists)
def test_no_bytes_make_it_fail(stream: bytes, cuts: list[int]) -> None:
    """The client's answer goes on, whatever the provider sent."""
    assert Usage() == read(stream, cuts).usage


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in msgspec.structs.fields(Usage)]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "input_tokens", "x"]), inner),
        ),
    )
)
def test_no_usage_makes_it_fail(usage: dict[str, Any]) -> None:
    """What is no count of tokens is unknown, and amounts in our own units are never a provider's to tell."""
    stream = told_by(start(**usage), delta(**usage), STOP)

    assert stream.usage == usage_of(json.dumps({"usage": usage}).encode())
    assert stream.usage.amounts == {}
    for name in ("input_tokens", "output_tokens"):
        told = usage.get(name)
        valid = type(told) is int and 0 <= told < 2**53
        assert (told if valid else None) == getattr(stream.usage, name)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        # The start is the base; a delta that tells the output only leaves the input.
        ([start(input_tokens=25, output_tokens=1), delta(output_tokens=15)], (25, None, None, 15)),
        # The delta's numbers are totals: with server tools much larger, and never added.
        (
            [
                start(input_tokens=2679, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=3),
                delta(input_tokens=10682, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=510),
            ],
            (10682, 0, 0, 510),
        ),
        # The last delta wins, also by less.
        (
            [start(input_tokens=9, output_tokens=1), delta(output_tokens=30), delta(output_tokens=20)],
            (9, None, None, 20),
        ),
        ([start(input_tokens=9, output_tokens=1), delta(output_tokens=0)], (9, None, None, 0)),
        # Null and absent leave what was told.
        (
            [
                start(input_tokens=9, cache_read_input_tokens=7, output_tokens=1),
                delta(input_tokens=None, output_tokens=2),
            ],
            (9, None, 7, 2),
        ),
        # An input-side 0 of a backend that fills the field keeps what the start told; a real 0 stays 0.
        (
            [
                start(input_tokens=9, cache_creation_input_tokens=5, cache_read_input_tokens=7, output_tokens=1),
                delta(input_tokens=0, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=4),
            ],
            (9, 5, 7, 4),
        ),
        ([start(input_tokens=0, output_tokens=1), delta(input_tokens=0, output_tokens=4)], (0, None, None, 4)),
        # A number that is none never replaces one.
        ([start(input_tokens=9, output_tokens=1), delta(input_tokens="12", output_tokens=-5)], (9, None, None, 1)),
        # Other events may carry usage; it means nothing.
        (
            [
                start(input_tokens=9, output_tokens=1),
                {"type": "future_event", "usage": {"input_tokens": 99, "output_tokens": 99}},
                {"type": "content_block_start", "usage": {"input_tokens": 99, "output_tokens": 99}},
                delta(output_tokens=4),
            ],
            (9, None, None, 4),
        ),
        # Only the first start counts.
        ([start(input_tokens=9, output_tokens=1), start(input_tokens=1, output_tokens=1)], (9, None, None, 1)),
    ],
)
def test_the_numbers_of_a_finished_stream(events: list[dict[str, Any]], expected: tuple[int | None, ...]) -> None:
    """(input, cache writes, cache reads, output) of the usage."""
    stream = told_by(*events, STOP)
    usage = stream.usage

    assert expected == (
        usage.input_tokens,
        usage.cache_creation_input_tokens,
        usage.cache_read_input_tokens,
        usage.output_tokens,
    )
    assert stream.finished
    assert stream.error is None


def test_all_that_a_stream_tells_is_kept() -> None:
    """The tier and the split of cache writes come at the start only, the rest at the end."""
    iteration = {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500}
    stream = told_by(
        start(
            "claude-opus-4-8",
            input_tokens=10,
            cache_creation_input_tokens=5,
            cache_read_input_tokens=7,
            cache_creation={"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 3},
            output_tokens=1,
            service_tier="priority",
            inference_geo="us",
        ),
        {"type": "ping"},
        delta(
            output_tokens=12,
            cache_creation={"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            service_tier="standard",
            output_tokens_details={"thinking_tokens": 4},
            server_tool_use={"web_search_requests": 1, "web_fetch_requests": 0},
            iterations=[iteration, {"type": "of_the_future", "input_tokens": 1, "spice": "saffron"}],
        ),
        STOP,
    )

    assert stream.usage == Usage(
        input_tokens=10,
        cache_creation_input_tokens=5,
        cache_read_input_tokens=7,
        output_tokens=12,
        cache_creation=CacheCreation(ephemeral_5m_input_tokens=2, ephemeral_1h_input_tokens=3),
        output_tokens_details=OutputTokensDetails(thinking_tokens=4),
        server_tool_use=ServerToolUse(web_search_requests=1, web_fetch_requests=0),
        service_tier="priority",
        inference_geo="us",
        iterations=(
            Iteration(type="compaction", input_tokens=180_000, output_tokens=3500),
            Iteration(type="of_the_future", input_tokens=1),
        ),
    )
    assert stream.model == "claude-opus-4-8"
    assert stream.quality == "final"


def test_events_without_a_name_are_told_by_their_type() -> None:
    """Some backends send data lines only."""
    stream = b"".join(
        b"data:" + json.dumps(event).encode() + b"\n\n"
        for event in (start(input_tokens=3, output_tokens=1), delta(output_tokens=8), STOP)
    )

    assert (Usage(input_tokens=3, output_tokens=8), "final") == state(read(stream))[:2]


def test_a_last_event_without_its_blank_line_counts() -> None:
    """The last bytes of a stream are not lost because the provider was in a hurry."""
    stream = wire(start(input_tokens=3, output_tokens=1), delta(output_tokens=8), STOP)

    assert state(read(stream)) == state(read(stream.rstrip(b"\n")))


# ── Streams that end early ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_cut_after_its_start_knows_its_input_exactly() -> None:
    """Of the output is charged what was seen: a token for each four characters begun, or what was told if more."""
    stream = told_by(
        start(input_tokens=40, cache_read_input_tokens=9, output_tokens=2), text("Hello, wörld"), text("!")
    )

    assert stream.usage == Usage(input_tokens=40, cache_read_input_tokens=9, output_tokens=4)
    assert stream.quality == "partial"
    assert not stream.finished
    assert stream.error is None


def test_a_stream_cut_before_any_text_has_the_output_that_was_told() -> None:
    """Less was seen than the provider has told already."""
    assert told_by(start(input_tokens=40, output_tokens=2), text("Hi")).usage == Usage(input_tokens=40, output_tokens=2)


def test_thinking_and_tool_input_are_output_as_well() -> None:
    """Thinking that is not shown is told in estimated tokens; thinking that is shown is counted once."""
    stream = told_by(
        start(input_tokens=40, output_tokens=1),
        content(type="thinking_delta", thinking="", estimated_tokens=50),
        content(type="thinking_delta", thinking="Hmmm", estimated_tokens=50),
        content(type="input_json_delta", partial_json='{"a":'),
        content(type="text_delta", text=None),
    )

    assert stream.usage.output_tokens == 50 + 3


def test_an_error_in_the_middle_is_visible() -> None:
    """HTTP said 200 long ago; the error is an event."""
    stream = told_by(start(input_tokens=40, output_tokens=1), text("x" * 400), ERROR)

    assert stream.error == "overloaded_error"
    assert stream.usage == Usage(input_tokens=40, output_tokens=100)
    assert stream.quality == "partial"
    assert not stream.finished


def test_a_finished_stream_is_charged_what_was_told_and_not_what_was_seen() -> None:
    """The provider's own number is the truth, also if it is 0."""
    stream = told_by(start(input_tokens=40, output_tokens=1), text("I can't help"), delta(output_tokens=0), STOP)

    assert stream.usage == Usage(input_tokens=40, output_tokens=0)
    assert stream.quality == "final"


@pytest.mark.parametrize("events", [[], [ERROR], [{"type": "ping"}], [{"type": "message_start", "message": None}]])
def test_a_stream_that_told_nothing_leaves_everything_unknown(events: list[dict[str, Any]]) -> None:
    """Unknown is not 0: what was held for it goes on counting."""
    stream = told_by(*events)

    assert stream.usage == Usage()
    assert stream.quality == "estimated"
    assert not stream.started


# ── Quality, and plain answers ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("usage", "quality"),
    [
        (Usage(input_tokens=1, output_tokens=1), "final"),
        (Usage(input_tokens=0, output_tokens=0), "final"),
        (Usage(input_tokens=1, output_tokens=1, cache_creation_input_tokens=0), "final"),
        (Usage(input_tokens=1, output_tokens=1, cache_creation_input_tokens=5), "split_unknown"),
        (
            Usage(
                input_tokens=1,
                output_tokens=1,
                cache_creation_input_tokens=5,
                cache_creation=CacheCreation(ephemeral_5m_input_tokens=5),
            ),
            "final",
        ),
        (
            Usage(
                input_tokens=1,
                output_tokens=1,
                cache_creation_input_tokens=500,
                cache_creation=CacheCreation(ephemeral_5m_input_tokens=5, ephemeral_1h_input_tokens=0),
            ),
            "split_unknown",
        ),
        (Usage(input_tokens=1), "estimated"),
        (Usage(output_tokens=1), "estimated"),
        (Usage(), "estimated"),
    ],
)
def test_quality(usage: Usage, quality: str) -> None:
    """A price needs the time to live of every cached token, so a split that does not add up is no split."""
    assert quality == quality_of(usage)


def test_a_split_without_its_sum_is_summed() -> None:
    """Limits count the sum of cache writes, so it must not be missed when only the split is told."""
    split = {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 3}

    assert told_by(start(input_tokens=1, output_tokens=1, cache_creation=split)).usage.cache_creation_input_tokens == 5
    assert told_by(start(input_tokens=1, output_tokens=1, cache_creation={})).usage.cache_creation_input_tokens is None


def test_a_plain_answer() -> None:
    """The same usage as a stream of the same numbers."""
    usage = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 5,
        "cache_read_input_tokens": 7,
        "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 0},
        "output_tokens": 12,
        "server_tool_use": None,
        "service_tier": "standard",
    }
    answer = json.dumps({"id": "msg_1", "type": "message", "content": [], "usage": usage}).encode()

    assert usage_of(answer) == told_by(start(**usage), STOP).usage
    assert usage_of(answer).cache_creation == CacheCreation(ephemeral_5m_input_tokens=5, ephemeral_1h_input_tokens=0)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[1]",
        b"null",
        b'{"usage": 3}',
        b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}',
        b"[" * 100_000,
        b'{"usage": {"input_tokens": 1e400, "output_tokens": "\xff"}}',
    ],
)
def test_an_answer_without_usage_tells_nothing(answer: bytes) -> None:
    """Not 0, and no failure."""
    assert usage_of(answer) == Usage()


def test_a_long_stream_in_tiny_pieces_takes_linear_time() -> None:
    """A million pieces of one byte are as good as one piece of a megabyte."""
    stream = wire(start(input_tokens=1, output_tokens=1), text("x" * 1_000_000), delta(output_tokens=250_000), STOP)
    rng = random.Random(1)
    cuts = rng.sample(range(len(stream)), 200_000)

    assert state(read(stream)) == state(read(stream, cuts))


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_an_event_that_nobody_knows_yet_takes_no_conclusion_back(line_end: bytes) -> None:
    """Engineer: however its lines end, and so whoever reads it here."""
    stream = UsageStream()
    for event in (
        b'event: message_start\ndata: {"message": {"usage": {"input_tokens": 3}}}\n\n',
        b'event: message_delta\ndata: {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}}\n\n',
        b'event: content_block_odd\ndata: {"type": "content_block_odd"}\n\n',
    ):
        stream.feed(event.replace(b"\n", line_end))

    assert stream.concluded
