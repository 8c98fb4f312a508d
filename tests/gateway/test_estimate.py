"""Estimates before the call, judged by published examples and by a simulated provider."""

from __future__ import annotations

import json
import random
import statistics
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterlib.core.usage import Iteration, ServerToolUse, Usage, amount_of
from meterlib.gateway.content import image_size, image_tokens, model_of, pdf_pages, weigh_text
from meterlib.gateway.estimate import CacheAwareEstimator, Estimate
from meterlib.gateway.prompt import prompt_of
from tests.gateway.judge import Agent, Provider
from tests.gateway.test_prompt import EPHEMERAL, HOUR, bodies, text, user

MODEL = "claude-sonnet-4-5"
LONG = "lorem ipsum dolor sit amet " * 400  # some 2,500 tokens: long enough to be cached


class Seconds:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def estimator(seconds: Seconds) -> CacheAwareEstimator:
    return CacheAwareEstimator(seconds)


def estimate(estimator: CacheAwareEstimator, *, tenant: str = "acme", model: str = MODEL, **fields: Any) -> Estimate:
    return estimator.estimate(tenant, prompt_of(json.dumps({"model": model} | fields).encode()))


def tokens(usage: Usage) -> tuple[int | None, int | None, int | None]:
    """Read from the cache, written to it, neither."""
    return usage.cache_read_input_tokens, usage.cache_creation_input_tokens, usage.input_tokens


def told(read: int, written: int, rest: int, **more: Any) -> Usage:
    return Usage(
        cache_read_input_tokens=read, cache_creation_input_tokens=written, input_tokens=rest, output_tokens=9, **more
    )


# ── Published examples ────────────────────────────────────────────────────────────────────────────────────────────────

WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather in a given location",
    "input_schema": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}},
        "required": ["location"],
    },
}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQK"}}


@pytest.mark.parametrize(
    ("fields", "published", "within"),
    [
        ({"system": "You are a scientist", "messages": [user("Hello, Claude")]}, 14, 1),
        ({"tools": [WEATHER], "messages": [user("What's the weather like in San Francisco?")]}, 403, 8),
        ({"messages": [user(PDF, text("Please summarize this document."))]}, 2_188, 12),
    ],
)
def test_published_examples_are_met(
    estimator: CacheAwareEstimator, fields: dict[str, Any], published: int, within: int
) -> None:
    """Short prompts, tools and documents are estimated as the provider counts them, before anything is learnt."""
    usage = estimate(estimator, model="claude-opus-5", **fields).usage

    assert (0, 0) == (usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
    assert abs((usage.input_tokens or 0) - published) <= within


@pytest.mark.parametrize(
    ("size", "standard", "sharp"),
    [
        ((1000, 1000), 1_296, 1_296),
        ((1920, 1080), 1_560, 2_691),
        ((200, 200), 64, 64),
        ((1, 1), 1, 1),
        ((2400, 1700), 1_518, 4_698),
        ((4000, 3300), 1_548, 4_650),
    ],
)
def test_images_cost_what_is_published(size: tuple[int, int], standard: int, sharp: int) -> None:
    """Patches of 28 pixels, after scaling down to what the model takes."""
    assert standard == image_tokens(*size, model_of("claude-sonnet-4-5-20250929"))
    assert sharp == image_tokens(*size, model_of("claude-opus-4-7")) == image_tokens(*size, model_of("claude-opus-5"))


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(["claude-opus-5", "claude-haiku-4-5"]))
def test_no_image_costs_more_than_the_most_or_less_than_a_smaller_one_by_much(
    width: int, height: int, name: str
) -> None:
    """Large images are scaled down, and not refused or counted in full."""
    model = model_of(name)
    found = image_tokens(width, height, model)

    assert 1 <= found <= model.image_tokens_max
    assert found >= 0.85 * image_tokens(width * 4 // 5 + 1, height * 4 // 5 + 1, model)


def test_forced_tools_have_a_hidden_prompt_of_their_own(estimator: CacheAwareEstimator) -> None:
    """286 or 406 tokens with Opus 5, and none without tools."""
    asked: dict[str, Any] = {"model": "claude-opus-5", "messages": [user("Hi")]}
    free = estimate(estimator, tools=[WEATHER], **asked).usage.input_tokens or 0
    forced = estimate(estimator, tools=[WEATHER], tool_choice={"type": "any"}, **asked).usage.input_tokens or 0
    without = estimate(estimator, tools=[], tool_choice={"type": "none"}, **asked).usage.input_tokens or 0

    assert 120 == forced - free
    assert without < 10


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("claude-opus-5", 512), ("claude-opus-4-5-20251101", 4_096), ("claude-3-5-haiku-20241022", 2_048),
        ("anthropic.claude-sonnet-4-5-20250929-v1:0", 1_024), ("claude-sonnet-4-20250514", 1_024), ("llama", 1_024),
        ("claude-haiku-4-5@20251001", 4_096), ("claude-opus-4-7", 2_048), ("claude-opus-4-8", 1_024), ("", 1_024),
    ],
)  # fmt: skip
def test_models_are_known_by_their_names(name: str, least: int) -> None:
    """Dates and prefixes of other platforms do not matter."""
    assert least == model_of(name).cached_tokens_min


# ── Text, images, documents ───────────────────────────────────────────────────────────────────────────────────────────


def test_data_weighs_more_than_prose_and_what_json_escapes_no_more_than_it_is() -> None:
    """One ratio serves all kinds of text."""
    prose, data = b"the quick brown fox jumps over", b'{"a":1,"b":[2,3],"c":{"d":4}}'

    assert 1.9 < weigh_text(data) / len(data) / (weigh_text(prose) / len(prose)) < 2.4
    assert weigh_text(data) == weigh_text(json.dumps(data.decode()).encode()) - weigh_text(b'""')


def test_letters_beyond_ascii_are_less_than_a_token_each() -> None:
    """Whether a text is Russian, Korean or Chinese, a character is about one token."""
    for characters in (
        "Съешь же ещё этих мягких французских булок",
        "키스의 고유조건은 입술끼리 만나야 하고",
        "床前明月光疑是地上霜",
    ):
        estimated_tokens = weigh_text(characters.encode()) / 3.5
        assert 0.5 < estimated_tokens / len(characters) < 1.25


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\2\0\0\0"


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + b"\xf7\0\0"


def jpeg(width: int, height: int) -> bytes:
    exif = b"\xff\xe1" + (40_002).to_bytes(2, "big") + b"\xff\xc0" * 20_000  # a preview with a header of its own
    padded = b"\xff\xff\xff\xdb\0\x04ab"
    return b"\xff\xd8" + exif + padded + b"\xff\xc2\0\x11\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big")


def webp(kind: bytes, size: bytes) -> bytes:
    return b"RIFF\0\0\0\0WEBP" + kind + b"\0\0\0\0" + size + bytes(20)


def webp_extended(width: int, height: int) -> bytes:
    return webp(b"VP8X", bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


def webp_lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"/" + ((height - 1) << 14 | (width - 1)).to_bytes(4, "little"))


def webp_lossy(width: int, height: int) -> bytes:
    return webp(b"VP8 ", b"abc\x9d\x01\x2a" + width.to_bytes(2, "little") + height.to_bytes(2, "little"))


@pytest.mark.parametrize("made", [png, gif, jpeg, webp_extended, webp_lossless, webp_lossy])
@given(width=st.integers(1, 16_383), height=st.integers(1, 16_383))
@settings(max_examples=20)
def test_the_size_of_an_image_is_read_from_its_header(made: Any, width: int, height: int) -> None:
    """Whatever format it has, and also if a client escapes its slashes."""
    data = b64encode(made(width, height) + bytes(50))

    assert (width, height) == image_size(data) == image_size(data.replace(b"/", b"\\/"))


@given(st.binary(max_size=80), st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"RIFF1234WEBPVP8L"]))
def test_what_is_no_image_has_no_size(data: bytes, begins: bytes) -> None:
    """It is no error: the provider decides about it."""
    for made in (data, b64encode(begins + data), b64encode(begins + data)[:-1]):
        size = image_size(made)
        assert size is None or min(size) > 0
        assert 1 <= pdf_pages(made) <= 600


def test_a_pdf_has_as_many_pages_as_it_says_or_else_as_its_size_suggests() -> None:
    """A long document is not estimated like a page."""
    tree = b"%PDF-1.4\n1 0 obj<</Type/Pages /Count 4>>" + b"<</Type/Pages/Count 12 /Kids[]>>"

    assert 12 == pdf_pages(b64encode(tree + bytes(900_000)))
    assert 12 == pdf_pages(b64encode(bytes(900_000) + tree))
    assert 15 == pdf_pages(b64encode(bytes(900_000)))
    assert 1 == pdf_pages(b"")


@pytest.mark.parametrize("place", ["message", "tool_result"])
def test_images_are_found_wherever_they_stand(estimator: CacheAwareEstimator, place: str) -> None:
    """Screenshots come as results of tools; those that are not in the request are taken for average."""
    images = [
        {"type": "image", "source": {"type": "base64", "data": b64encode(png(1000, 1000)).decode()}},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
    ]
    result = {"type": "tool_result", "tool_use_id": "t", "content": images}
    messages = [user(*images) if place == "message" else user(result)]

    assert 1_296 + 1_560 <= (estimate(estimator, messages=messages).usage.input_tokens or 0) < 2_870


def test_thinking_counts_even_if_only_its_signature_is_told(estimator: CacheAwareEstimator) -> None:
    """Claude Code is not told what the model thinks, and is charged for it all the same."""
    hidden = {"type": "thinking", "thinking": "", "signature": "A" * 4_000}
    shown = {"type": "thinking", "thinking": "hm " * 1_000, "signature": "A" * 100}
    counted = [
        estimate(estimator, messages=[{"role": "assistant", "content": [block]}]).usage.input_tokens or 0
        for block in (hidden, shown)
    ]

    assert all(700 < count < 800 for count in counted)


def test_tools_that_wait_to_be_searched_for_are_not_counted(estimator: CacheAwareEstimator) -> None:
    """Hundreds of tools may be defined, and not be in the prompt."""
    waiting = [WEATHER | {"description": LONG, "defer_loading": True} for _ in range(50)]
    usage = estimate(estimator, tools=[WEATHER, *waiting], messages=[user("Hi")]).usage

    assert (usage.input_tokens or 0) < 700


# ── The provider's cache ──────────────────────────────────────────────────────────────────────────────────────────────


def conversation(*turns: str, last: Any = EPHEMERAL) -> dict[str, Any]:
    """A long system with a breakpoint, then turns, of which the last one has a breakpoint."""
    messages = [user(text(turn)) for turn in turns]
    messages[-1]["content"][-1] |= {"cache_control": last} if last else {}
    return {"system": [text(LONG, cache_control=EPHEMERAL)], "messages": messages}


def test_what_a_settled_call_had_cached_is_read_at_its_exact_length(estimator: CacheAwareEstimator) -> None:
    """The next turn of a conversation is charged only for what is new."""
    first = estimate(estimator, **conversation("Hello"))
    estimator.learn(first, told(0, 7_777, 3))

    read, written, rest = tokens(estimate(estimator, **conversation("Hello", LONG, last=None)).usage)
    assert 0 < (read or 0) < 7_777, "only the system can be read: nothing points to the messages"
    read, written, rest = tokens(estimate(estimator, **conversation("Hello", LONG)).usage)
    assert (7_777, 0) == (read, rest)
    assert 2_000 < (written or 0) < 12_000


def test_nothing_is_taken_for_cached_before_its_call_is_settled(estimator: CacheAwareEstimator) -> None:
    """A call that was refused has nothing cached, and many that run at once cannot read from each other."""
    estimates = [estimate(estimator, **conversation("Hello")).usage for _ in range(3)]

    assert [0, 0, 0] == [usage.cache_read_input_tokens for usage in estimates]


def test_what_follows_the_last_breakpoint_is_no_cache_write(estimator: CacheAwareEstimator) -> None:
    """The estimate's parts are what the provider will call them."""
    read, written, rest = tokens(
        estimate(estimator, system=[text(LONG, cache_control=EPHEMERAL)], messages=[user(LONG)]).usage
    )

    assert 0 == read
    assert written == pytest.approx(rest, abs=5)


def test_a_prompt_that_is_too_short_is_not_cached(estimator: CacheAwareEstimator) -> None:
    """The least length is the model's; what is shorter is plain input."""
    fields: dict[str, Any] = {"system": [text(LONG, cache_control=EPHEMERAL)], "messages": [user("Hi")]}

    for model, cached in (("claude-sonnet-4-5", True), ("claude-haiku-4-5", False)):
        found = estimate(estimator, model=model, **fields)
        assert cached == bool(found.usage.cache_creation_input_tokens)
        estimator.learn(found, told(0, 0, 2_500))
        assert 0 == estimate(estimator, model=model, **fields).usage.cache_read_input_tokens


def test_a_system_that_is_too_short_is_not_cached_though_the_conversation_is(estimator: CacheAwareEstimator) -> None:
    """Only prefixes of the least length can be read by another conversation."""
    short = {"system": [text("Be brief. " * 40, cache_control=EPHEMERAL)]}
    estimator.learn(estimate(estimator, **conversation(LONG) | short), told(0, 2_600, 3))

    assert 0 == estimate(estimator, **conversation("Something else") | short).usage.cache_read_input_tokens
    assert 2_600 == estimate(estimator, **conversation(LONG) | short).usage.cache_read_input_tokens


@pytest.mark.parametrize(("control", "ttl_s"), [(EPHEMERAL, 300), (HOUR, 3_600)])
def test_a_prefix_lives_as_long_as_it_is_used(
    estimator: CacheAwareEstimator, seconds: Seconds, control: Any, ttl_s: int
) -> None:
    """Each use prolongs it; after its time to live without one it has to be written again."""
    fields: dict[str, Any] = {"messages": [user(text(LONG, cache_control=control))]}
    estimator.learn(estimate(estimator, **fields), told(0, 2_500, 3))
    for _ in range(3):
        seconds.now_s += ttl_s - 1
        used = estimate(estimator, **fields)
        assert 2_500 == used.usage.cache_read_input_tokens
        estimator.learn(used, told(2_500, 0, 3))
    seconds.now_s += ttl_s

    assert 0 == estimate(estimator, **fields).usage.cache_read_input_tokens


@pytest.mark.parametrize(
    "changed",
    [
        {"tenant": "globex"}, {"model": "claude-opus-4-8"}, {"speed": "fast"}, {"system": [text("Be brief")]},
        {"tool_choice": {"type": "any"}}, {"thinking": {"type": "enabled"}}, {"tools": [WEATHER]},
    ],
)  # fmt: skip
def test_nothing_is_read_where_the_provider_would_find_nothing(
    estimator: CacheAwareEstimator, changed: dict[str, Any]
) -> None:
    """Another tenant, model or setting, or another beginning, has a cache of its own."""
    fields: dict[str, Any] = {"messages": [user(text(LONG, cache_control=EPHEMERAL))]}
    estimator.learn(estimate(estimator, **fields), told(0, 2_500, 3))

    assert 2_500 == estimate(estimator, **fields).usage.cache_read_input_tokens
    assert 0 == estimate(estimator, **fields | changed).usage.cache_read_input_tokens


def test_settings_of_messages_leave_the_system_cached(estimator: CacheAwareEstimator) -> None:
    """Forcing a tool does not make the whole prompt new; another speed leaves the tools."""
    tool = WEATHER | {"description": LONG, "cache_control": EPHEMERAL}
    fields = conversation("Hello") | {"tools": [tool]}
    estimator.learn(estimate(estimator, **fields), told(0, 6_000, 3))

    found = [
        estimate(estimator, **fields | changed).usage.cache_read_input_tokens or 0
        for changed in ({"speed": "fast"}, {"tool_choice": {"type": "any"}}, {})
    ]
    assert 2_000 < found[0] < 4_000 < found[1] < found[2] == 6_000


@pytest.mark.parametrize(("more_blocks", "found"), [(19, True), (20, False)])
def test_the_provider_looks_back_twenty_blocks_from_a_breakpoint(
    estimator: CacheAwareEstimator, more_blocks: int, found: bool
) -> None:
    """A turn of many parallel tools loses the conversation, and is charged for all of it."""
    first = [text(LONG, cache_control=EPHEMERAL)]
    estimator.learn(estimate(estimator, messages=[user(*first)]), told(0, 2_500, 3))
    more = [text(f"{n}") for n in range(more_blocks)]
    more[-1] |= {"cache_control": EPHEMERAL}
    without_the_first = [text(LONG), *more]

    assert found == bool(estimate(estimator, messages=[user(*without_the_first)]).usage.cache_read_input_tokens)
    assert 2_500 == estimate(estimator, messages=[user(*first, *more)]).usage.cache_read_input_tokens


def test_a_prefix_that_was_not_read_after_all_is_forgotten(estimator: CacheAwareEstimator) -> None:
    """If the provider dropped it early, the estimate is wrong once and not again."""
    turn = conversation("Hello")
    estimator.learn(estimate(estimator, **turn), told(0, 3_000, 3))
    longer = conversation("Hello", "again", last=None) | {"cache_control": EPHEMERAL}
    expected = estimate(estimator, **longer)
    estimator.learn(expected, told(0, 0, 3_010))

    assert 3_000 == expected.usage.cache_read_input_tokens
    assert (estimate(estimator, **turn).usage.cache_read_input_tokens or 0) < 3_000


def test_lengths_between_two_known_ones_are_told_in_proportion(estimator: CacheAwareEstimator) -> None:
    """A subagent that shares only the system reads about as much as that is, even at an unusual ratio."""
    estimator.learn(estimate(estimator, **conversation(LONG)), told(0, 20_000, 3))

    read = estimate(estimator, **conversation("Something else")).usage.cache_read_input_tokens
    assert read == pytest.approx(10_000, rel=0.01)


# ── What is learnt ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(0.1, 1.0), st.integers(0, 2**32))
@settings(max_examples=20)
def test_the_ratio_of_a_tenants_text_is_found(ratio: float, seed: int) -> None:
    """After a few calls estimates are right, whatever the tokenizer and whatever the tenant writes in."""
    estimator = CacheAwareEstimator(Seconds())
    rng = random.Random(seed)
    for _ in range(25):
        words = "word " * rng.randint(500, 3_000)
        found = estimate(estimator, messages=[user(words)])
        actual = round(len(words) * ratio) + 4
        estimator.learn(found, told(0, 0, actual))

    assert found.usage.input_tokens == pytest.approx(actual, rel=0.05)


def test_a_new_tenant_starts_from_what_others_have_told_of_the_model(estimator: CacheAwareEstimator) -> None:
    """The first call of a customer is estimated as well as the thousandth, if the model is known."""
    asked: dict[str, Any] = {"messages": [user(LONG)]}
    before = estimate(estimator, **asked).usage.input_tokens or 0
    for _ in range(10):
        estimator.learn(estimate(estimator, **asked), told(0, 0, before * 2))

    assert estimate(estimator, tenant="globex", **asked).usage.input_tokens == pytest.approx(before * 2, rel=0.05)
    assert before == estimate(estimator, model="claude-opus-4-8", **asked).usage.input_tokens


def test_one_strange_call_does_not_spoil_a_ratio_that_is_known(estimator: CacheAwareEstimator) -> None:
    """A tenant's estimates do not jump about."""
    asked: dict[str, Any] = {"messages": [user(LONG)]}
    for _ in range(20):
        estimator.learn(estimate(estimator, **asked), told(0, 0, 3_000))
    estimator.learn(estimate(estimator, **asked), told(0, 0, 6_000))

    assert 3_000 < (estimate(estimator, **asked).usage.input_tokens or 0) < 3_600


@pytest.mark.parametrize(
    "usage",
    [
        Usage(output_tokens=5),
        Usage(input_tokens=10_000_000),
        Usage(input_tokens=0),
        told(0, 0, 12_000, server_tool_use=ServerToolUse(web_search_requests=2)),
        told(0, 0, 800, iterations=(Iteration(type="compaction", input_tokens=9_000), Iteration(input_tokens=800))),
    ],
)
def test_numbers_that_are_not_of_the_prompt_teach_nothing(estimator: CacheAwareEstimator, usage: Usage) -> None:
    """Searches and compaction within a call, unknown numbers and absurd ones leave the ratio alone."""
    asked: dict[str, Any] = {"messages": [user(LONG)]}
    before = estimate(estimator, **asked)
    estimator.learn(before, usage)

    assert before.usage == estimate(estimator, **asked).usage


def test_memory_is_bounded() -> None:
    """However many prompts, tenants and models come by; those used last are remembered."""
    estimator = CacheAwareEstimator(Seconds(), prefixes_max=10, ratios_max=4)
    for n in range(50):
        asked: dict[str, Any] = {"messages": [user(text(f"{n} {LONG}", cache_control=EPHEMERAL))]}
        estimator.learn(estimate(estimator, tenant=f"t{n}", model=f"m{n}", **asked), told(0, 2_600, 3))

    assert (10, 4) == (len(estimator._prefixes), len(estimator._ratios))
    assert 2_600 == estimate(estimator, tenant="t49", model="m49", **asked).usage.cache_read_input_tokens


@settings(max_examples=300)
@given(st.lists(bodies, min_size=1, max_size=3), st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_whatever_is_sent_can_be_estimated_and_learnt_from(sent: list[Any], counts: list[int]) -> None:
    """No client can make an estimate fail or turn negative."""
    estimator = CacheAwareEstimator(Seconds())
    for number, body in enumerate(sent):
        prompt = prompt_of(json.dumps(body | {"model": "m", "stream": True}).encode())
        found = estimator.estimate("acme", prompt)
        estimator.learn(found, told(*counts[number * 3 : number * 3 + 3]))
        again = estimator.estimate("acme", prompt)
        assert all((count or 0) >= 0 for count in (*tokens(found.usage), *tokens(again.usage)))


# ── Judged by a simulated provider ────────────────────────────────────────────────────────────────────────────────────


def judged(
    seed: int, *, ttls: list[str | None], factor: float, turns: int, unsettled: float = 0.02
) -> tuple[list[float], float]:
    """Actual by estimated charge of each call after its agent's second, of agents that take turns at random; and which
    share of all input was read from the cache."""
    rng = random.Random(seed)
    seconds, provider = Seconds(), Provider(factor)
    estimator = CacheAwareEstimator(seconds)
    agents = [
        Agent(random.Random(seed * 100 + n), system_size=20_000 if n < 2 else 6_000, ttl=ttl).requests(MODEL)
        for n, ttl in enumerate(ttls)
    ]
    made = [0] * len(agents)
    ratios = []
    read = sent = 0
    for _ in range(turns * len(agents)):
        number = rng.randrange(len(agents))
        made[number] += 1
        seconds.now_s += rng.expovariate(1 / 8) if rng.random() < 0.97 else rng.uniform(200, 700)
        request = next(agents[number])
        found = estimator.estimate("acme", prompt_of(json.dumps(request).encode()))
        used = provider.call(request, seconds.now_s)
        read += used.cache_read_input_tokens or 0
        sent += (used.cache_read_input_tokens or 0) + charged(used)
        seconds.now_s += rng.uniform(1, 10)
        if rng.random() >= unsettled:
            estimator.learn(found, used)
        if made[number] > 2:
            ratios.append(charged(used) / charged(found.usage))
    return ratios, read / sent


def charged(usage: Usage) -> int:
    return max(1, amount_of(usage, "input_tokens") or 0)


@pytest.mark.parametrize(
    ("ttls", "factor", "reads"),
    [([None], 1.0, 0.95), (["1h", "1h"], 1.3, 0.95), ([None, "1h", None, None], 1.3, 0.8)],
    ids=["one agent", "two agents, an hour", "two agents and two subagents"],
)
def test_agents_are_estimated_near_what_they_are_charged(ttls: list[str | None], factor: float, reads: float) -> None:
    """Half of all calls are off by less than a tenth, and nineteen of twenty by less than four tenths.

    Most of each prompt is read from the cache, the agents read code, data, listings, prose and images, pause for
    longer than their prefixes live, and lose a call now and then.
    """
    ratios, share = judged(7, ttls=ttls, factor=factor, turns=60)

    assert share >= reads
    assert 0.90 <= statistics.median(ratios) <= 1.10
    off = sorted(abs(ratio - 1) for ratio in ratios)
    assert off[len(off) // 2] <= 0.10
    assert off[len(off) * 95 // 100] <= 0.40
    assert max(ratios) < 1.6, "a charge far above its estimate is what a limit must not let through"
