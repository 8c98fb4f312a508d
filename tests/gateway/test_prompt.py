"""What is read of a request's body, and that nothing a client sends can do harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterlib.errors import InvalidInput
from meterlib.gateway.prompt import Breakpoint, Prompt, prompt_of

EPHEMERAL = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}


def read(ascii_only: bool = False, **fields: Any) -> Prompt:
    return prompt_of(json.dumps({"model": "claude-sonnet-4-5"} | fields, ensure_ascii=ascii_only).encode())


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words} | fields


def test_the_settings_are_those_of_the_body() -> None:
    """Metering knows what was asked for."""
    prompt = read(stream=True, max_tokens=128_000, speed="fast", tool_choice={"type": "any"})

    assert ("claude-sonnet-4-5", True, 128_000, "fast", True) == (
        prompt.model,
        prompt.stream,
        prompt.max_tokens,
        prompt.speed,
        prompt.must_use_tool,
    )
    assert (False, None, None, False) == (read().stream, read().max_tokens, read().speed, read().must_use_tool)


@pytest.mark.parametrize("odd", [-1, 2**53, 1.5, "9", None, [], 10**400])
def test_an_odd_limit_of_output_is_none(odd: Any) -> None:
    """The provider decides about it; metering does without."""
    assert read(max_tokens=odd).max_tokens is None


def test_content_stands_in_the_order_of_caching() -> None:
    """Tools, then the system, then the messages, wherever they stand in the body."""
    prompt = prompt_of(
        b'{"messages": [{"content": "c", "role": "user"}, {"role": "assistant", "content": []}], "model": "m",'
        b' "system": "b", "tools": [{"name": "a"}], "unknown": {"deep": [1, {}]}}'
    )

    assert [{"name": b'"a"'}, {"type": b'"text"', "text": b'"b"'}] == [
        {name: bytes(value) for name, value in block.items()} for block in prompt.blocks[:2]
    ]
    assert {"type": b'"text"', "text": b'"c"', "role": b'"user"'} == {
        name: bytes(value) for name, value in prompt.blocks[2].items()
    }
    assert (1, 2, 3) == (prompt.system_at, prompt.messages_at, len(prompt.blocks))


# ── What the provider takes for the same ──────────────────────────────────────────────────────────────────────────────

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(words, st.booleans(), st.booleans())
def test_plain_text_equals_a_block_of_it_with_or_without_a_breakpoint(
    spoken: str, ascii_only: bool, ascii_other: bool
) -> None:
    """A conversation is found in the cache again after its breakpoint has moved on, whatever a client escapes."""
    plain = read(ascii_only, system=spoken, messages=[user(spoken)])
    blocks = read(
        ascii_other,
        system=[text(spoken, cache_control=EPHEMERAL)],
        messages=[user(text(spoken, cache_control=HOUR))],
    )

    assert plain.blocks == blocks.blocks
    assert () == plain.breakpoints
    assert (Breakpoint(0, 300), Breakpoint(1, 3600)) == blocks.breakpoints


def test_slashes_that_a_client_escapes_make_no_difference() -> None:
    """PHP writes them with a backslash."""
    escaped = prompt_of(b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"a\\/b"}]}]}')

    assert read(messages=[user("a/b")]).blocks == escaped.blocks


def test_who_says_something_makes_a_difference() -> None:
    """The same words of the assistant are another prompt."""
    assert read(messages=[user("a")]).blocks != read(messages=[{"role": "assistant", "content": "a"}]).blocks


@pytest.mark.parametrize(
    "changed",
    [
        {"tool_choice": {"type": "auto"}},
        {"thinking": {"type": "adaptive"}},
        {"messages": [user({"type": "image", "source": {}})]},
        {"messages": [user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]})]},
    ],
)
def test_settings_that_empty_the_cache_of_messages_are_told(changed: dict[str, Any]) -> None:
    """As documented: the choice of tools, thinking, and whether there are images at all."""
    assert read().settings != read(**changed).settings


def test_words_about_images_are_no_image() -> None:
    """A file that mentions them does not empty the cache."""
    said = {"type": "tool_result", "tool_use_id": "t", "content": '[{"type": "image"}]'}

    assert read().settings == read(messages=[user(said), user(text('"image"'))]).settings


# ── Breakpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_breakpoints_of_tools_system_and_messages_are_found() -> None:
    """Each tells how long its prefix is kept; null stands for none."""
    prompt = read(
        tools=[{"name": "a"}, {"name": "b", "cache_control": HOUR}],
        system=[text("s", cache_control=None), text("s", cache_control=EPHEMERAL | {"ttl": "5m"})],
        messages=[user("x"), user(text("y"), text("z", cache_control=EPHEMERAL))],
    )

    assert (Breakpoint(1, 3600), Breakpoint(3, 300), Breakpoint(6, 300)) == prompt.breakpoints


@pytest.mark.parametrize(
    ("last", "at"),
    [
        ([text("a"), text("b")], 1),
        ([text("a"), text("")], 0),
        ([text("a"), {"type": "thinking", "thinking": "hm", "signature": "x"}], 0),
        ([text(""), {"type": "redacted_thinking", "data": "x"}], None),
    ],
)
def test_automatic_caching_is_a_breakpoint_at_the_last_block_that_can_have_one(last: Any, at: int | None) -> None:
    """`cache_control` of the whole request moves along with the conversation by itself."""
    prompt = read(cache_control=HOUR, messages=[user(*last)])

    assert (() if at is None else (Breakpoint(at, 3600),)) == prompt.breakpoints


def test_automatic_caching_adds_nothing_to_a_breakpoint_at_the_same_place() -> None:
    """Four breakpoints are the most there can be."""
    prompt = read(cache_control=EPHEMERAL, messages=[user(text("a", cache_control=EPHEMERAL))])

    assert (Breakpoint(0, 300),) == prompt.breakpoints


# ── What cannot be read ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b'{"model": "m"} x', b'{"model": "m", "x": NaN}', b'{"model": "m", "x": 01}',
        b'\xef\xbb\xbf{"model": "m"}', b'{"model": "m", "x": "\xff"}', b'{"model": "m", "\xff": 1}',
        b'{"model": "m", "x": "\xed\xa0\x80"}', '{"model": "m"}'.encode("utf-16"),
        b'{"model": "m", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[" * 100_000,
        b'{"model": "m", "messages": ' + b'[{"a":' * 5_000,
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    """It is not sent to the provider, and uses up no tokens."""
    with pytest.raises(InvalidInput) as refused:
        prompt_of(body)

    assert "body" == refused.value.field


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({}, "is missing"),
        ({"model": None}, "must be text"),
        ({"model": 5}, "must be text"),
        ({"model": ""}, "empty"),
        ({"model": "m" * 257}, "bytes"),
        ({"model": "m\n"}, "printed"),
        ({"model": " m"}, "space"),
    ],
)
def test_a_model_that_is_no_name_is_refused(told: Any, says: str) -> None:
    """It would be a label in the ledger."""
    with pytest.raises(InvalidInput, match=f"model: .*{says}") as refused:
        prompt_of(json.dumps(told).encode())

    assert "model" == refused.value.field


@pytest.mark.parametrize("stream", [None, 1, 0, "true", [], {}])
def test_a_stream_that_is_no_boolean_is_refused(stream: Any) -> None:
    """Whether the answer is a stream must be beyond doubt."""
    with pytest.raises(InvalidInput, match="stream: ") as refused:
        read(stream=stream)

    assert "stream" == refused.value.field


def test_of_a_field_that_comes_twice_the_last_one_counts() -> None:
    """As the provider reads it."""
    assert "b" == prompt_of(b'{"model": "a", "stream": 1, "stream": true, "model": "b"}').model


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "source", "data", "cache_control", "ttl", "x"]), inner
        )
        | st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "image", "document", "tool_result", "thinking"])},
            optional=dict.fromkeys(("text", "content", "source", "cache_control", "thinking"), inner),
        )
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"])}, optional={"content": inner})
    ),
    max_leaves=15,
)
FIELDS = ("stream", "max_tokens", "speed", "tool_choice", "thinking", "cache_control", "tools", "system", "messages")
bodies = st.fixed_dictionaries({"model": st.just("m") | values}, optional=dict.fromkeys(FIELDS, values))


@settings(max_examples=400)
@given(st.binary(max_size=60) | bodies.map(lambda body: json.dumps(body).encode()))
def test_whatever_is_sent_is_read_or_refused(body: bytes) -> None:
    """No client can make the gateway fail; odd content is the provider's to refuse."""
    try:
        prompt = prompt_of(body)
    except InvalidInput:
        return

    assert 0 <= prompt.system_at <= prompt.messages_at <= len(prompt.blocks)
    assert all(0 <= point.at < len(prompt.blocks) for point in prompt.breakpoints)
    assert sorted(point.at for point in prompt.breakpoints) == [point.at for point in prompt.breakpoints]
