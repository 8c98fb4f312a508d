"""Budgets in US dollars through the gateway: what is held before a call, what counts after it, and who is refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import AsyncMeter, LedgerEntry, Limit, Policy, PolicyError, StoreOptions, Usage
from meterlib.billing.prices.pricing import TermsBook, books_of
from meterlib.billing.rating.rated import Totals
from meterlib.billing.rating.rating import rate
from meterlib.config import Config
from meterlib.core.policy import CompiledPolicy
from meterlib.core.usd import COST, usd
from meterlib.gateway.asgi import MeteringMiddleware, Who
from meterlib.gateway.assembly import gateway_for, spending_for
from meterlib.gateway.spending import OUTPUT_TOKENS, Cost, Spending
from meterlib.settings import BillingSettings, TenantSettings
from tests.gateway.answers import STREAMS, Answer, Hold, delta, error, said, start, stream
from tests.gateway.test_admission import HASTY, shape
from tests.gateway.wire import Play, lasting
from tests.gateway.world import HOSTED, World, message, run, spending_of, with_settings

CENT = 10_000_000
DOLLAR = 100 * CENT
NOVEMBER = int(datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp() * 1000)
OWN = with_settings(HOSTED, funding="own", upstream_key_env="OWN")
TERMS = with_settings(HOSTED, discount="12.5%", markup="3%")
IN, OUT = 3_000, 15_000
"""What a token of `MODEL` costs, in nanodollars."""


def budget(cents: int = 100_00, **settings: Any) -> Limit:
    """So much a month."""
    told: dict[str, Any] = {"name": "spend", "unit": COST, "quota": cents * CENT, "period": "month"}
    return Limit(**told | settings)


def answer(output_tokens: int, input_tokens: int = 10, **more: Any) -> Answer:
    """A streamed answer that used so much."""
    begun = {"input_tokens": input_tokens, "output_tokens": 1, **more}
    return Answer(events=stream(usage_start=begun, usage_end={"output_tokens": output_tokens}))


def events_of(output_tokens: int) -> list[Any]:
    return list(answer(output_tokens).events or ())


async def standing(world: World) -> tuple[int, int]:
    """What of the budget is spent, and what is held."""
    (state,) = await world.meter.peek("acme", {"provider": "anthropic"})
    return state.used - state.held, state.held


def rated(entry: LedgerEntry, cost: str, *tenants: TenantSettings) -> int | None:
    """What an entry costs by rating, rounded up to nanodollars; None if some of it has no price."""
    billing = BillingSettings(fallback="none")
    totals = Totals(rate(entry, books_of(billing), TermsBook(billing, tenants).of(entry.tenant)))
    if not totals.complete:
        return None
    numerator, denominator = Decimal(getattr(totals, cost)).as_integer_ratio()
    return -(-numerator * 10**9 // denominator)


# ── What counts ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    ("tenant", "basis", "cost"),
    [
        (HOSTED, None, "billed_cost"),
        (TERMS, None, "billed_cost"),
        (TERMS, "list", "list_cost"),
        (OWN, None, "list_cost"),
        (with_settings(OWN, platform_fee="5%"), "billed", "billed_cost"),
    ],
)
def test_a_budget_counts_what_rating_says(name: str, tenant: TenantSettings, basis: Any, cost: str) -> None:
    """To the nanodollar: what is billed to hosted tenants, and what a call costs those who bring their key."""

    async def use(world: World) -> None:
        world.clock.set(NOVEMBER)
        world.provider.answers(Answer(events=STREAMS[name].events))
        assert (await world.post(stream=True)).whole
        entry = await world.entry()
        counted = rated(entry, cost, tenant)

        if name == "cached":  # where it was served makes no price of this model's: what was held goes on counting
            assert (None, False) == (counted, "amounts" in entry.usage)
            held: Any = entry.estimate["amounts"]
            assert (held[COST], 0) == await standing(world)
            return
        assert counted
        assert {COST: counted} == entry.usage["amounts"]
        assert (counted, 0) == await standing(world)

    run(use, tenant, limits=(budget(),), billing=BillingSettings(fallback="none", budget_basis=basis))


def test_without_such_a_limit_nothing_is_priced() -> None:
    """Nor is the price book read: most gateways have no use for it."""

    async def use(world: World) -> None:
        await world.post()
        assert "amounts" not in (await world.entry()).usage

    run(use, HOSTED, limits=(Limit(name="rpm", quota=9, window="1m"),))
    look = (
        "import sys; from meterlib.config import Config; from meterlib.gateway.assembly import gateway_for;"
        " import meterlib.cli.gateway; gateway_for(Config(), {});"
        " assert not [name for name in sys.modules if name.startswith('meterlib.billing') or 'genai' in name]"
    )
    subprocess.run([sys.executable, "-c", look], check=True, cwd=Path(__file__).parents[2])


def test_a_gateway_without_prices_has_no_such_limit() -> None:
    """A budget that counts nothing would be no budget."""
    with pytest.raises(PolicyError, match=r"limit\[0\].unit"):
        MeteringMiddleware(lambda *_: asyncio.sleep(0), a_meter(), lambda scope: None)

    async def use(world: World) -> None:
        world.gateway.reload(world.gateway.settings, world.gateway.callers, Policy(limits=[budget()]))

    with pytest.raises(PolicyError, match=r"limit\[0\].unit"):
        run(use, HOSTED)


def a_meter() -> AsyncMeter:
    return AsyncMeter.connect("memory://", Policy(limits=[budget()]), options=StoreOptions(shards=1))


@pytest.mark.parametrize("refusal", [error(529), error(400), Answer(status=502, raw=b"<html>")])
def test_an_error_of_the_provider_costs_nothing(refusal: Answer) -> None:
    async def use(world: World) -> None:
        world.provider.answers(refusal)
        await world.post()
        assert {COST: 0} == (await world.entry()).usage["amounts"]
        assert (0, 0) == await standing(world)

    run(use, HOSTED, limits=(budget(),))


def test_what_is_not_known_stays_held_for() -> None:
    """No answer came, so nobody knows what the call cost: its guess goes on counting."""

    async def use(world: World) -> None:
        world.provider.answers(Answer(instead="rst"))
        await world.post(max_tokens=100)
        entry = await world.entry()
        spent, held = await standing(world)
        at_first: Any = entry.estimate["amounts"]

        assert "amounts" not in entry.usage
        assert (at_first[COST], 0) == (spent, held)
        assert 100 * OUT <= spent

    run(use, HOSTED, limits=(budget(),))


# ── What is held ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hold_follows_what_is_known() -> None:
    """The guess of the input and some output; then the exact input; then twice what was seen; then what it was."""
    first, second, third = Hold(), Hold(), Hold()
    begun = {"input_tokens": 1_000, "output_tokens": 1}
    events: list[Any] = [first, start(begun), second, *said("x" * 4 * 5_000, characters=1000), third]

    async def use(world: World) -> None:
        world.provider.answers(Answer(events=[*events, delta({"output_tokens": 9_000}), {"type": "message_stop"}]))
        call = asyncio.ensure_future(world.post(stream=True, max_tokens=128_000))
        await first.reached()
        assert OUTPUT_TOKENS * OUT < (await standing(world))[1] < (OUTPUT_TOKENS + 50) * OUT
        first.release()
        await second.reached()
        await holds(world, 1_000 * IN + OUTPUT_TOKENS * OUT)
        second.release()
        await third.reached()
        await holds(world, 1_000 * IN + 10_000 * OUT, tend=True)
        third.release()
        await call
        await world.settled()
        assert (1_000 * IN + 9_000 * OUT, 0) == await standing(world)

    run(use, HOSTED, limits=(budget(),))


async def holds(world: World, amount: int, *, tend: bool = False) -> None:
    """Wait until so much is held."""
    async with asyncio.timeout(10):
        while (await standing(world))[1] != amount:
            if tend:
                world.gateway.tend()
            await asyncio.sleep(0.005)


def test_no_more_is_held_than_was_asked_for() -> None:
    """`max_tokens` is a bound, though no guess."""
    hold = Hold()

    async def use(world: World) -> None:
        world.provider.answers(Answer(events=[hold, *events_of(7)]))
        call = asyncio.ensure_future(world.post(stream=True, max_tokens=7))
        await hold.reached()
        assert 7 * OUT < (await standing(world))[1] < 50 * OUT
        hold.release()
        await call

    run(use, HOSTED, limits=(budget(),))


def test_how_long_answers_are_is_learnt() -> None:
    """By tenant and model; as long as they are all alike, what is held comes near to that."""
    hold = Hold()

    async def use(world: World) -> None:
        for _ in range(20):
            world.provider.answers(answer(200))
            await world.post(stream=True)
        world.provider.answers(Answer(events=[hold, *events_of(200)]))
        call = asyncio.ensure_future(world.post(stream=True))
        await hold.reached()
        assert 200 * OUT < (await standing(world))[1] < 250 * OUT
        hold.release()
        await call

    run(use, HOSTED, limits=(budget(),))


class OnePerToken:
    """Costs a nanodollar for each token of output, and nothing else."""

    def of(self, tenant: str, funding: Any) -> OnePerToken:
        return self

    def cost_nanousd(self, model: str, usage: Usage, *, at_ms: int, provider: str) -> int | None:
        return usage.output_tokens


def test_answers_that_vary_have_more_held_than_their_mean() -> None:
    """Twice as much more as they are off it; and a long one twice what was seen of it, but for what was asked for."""
    spending = Spending(OnePerToken())

    def of_call(max_tokens: int | None, speed: None) -> Cost:
        return spending.of_call("acme", "hosted", {"model": "m"}, max_tokens, speed)

    for tokens in [100, 300] * 50:
        of_call(None, None).at_last(Usage(output_tokens=tokens), None, 1, whole=True)
    cost = of_call(None, None)
    bounded = of_call(1_000, None)
    assert 370 < (cost.before(Usage()) or 0) < 430
    assert not cost.outgrown(370)

    assert (cost.outgrown(600), bounded.outgrown(600)) == (True, True)
    assert (1_200, 1_000) == (cost.before(Usage()), bounded.before(Usage()))
    assert (cost.outgrown(1_200), bounded.outgrown(1_200)) == (False, False)

    of_call(None, None).at_last(Usage(output_tokens=10**6), None, 1, whole=False)
    assert (of_call(None, None).before(Usage()) or 0) < 430, "an answer that was cut off tells nothing"


def test_a_guess_is_not_why_a_call_never_passes() -> None:
    """A budget smaller than what one call might cost lets one pass that nothing was spent before."""

    async def use(world: World) -> None:
        world.provider.answers(answer(1_000))
        assert 200 == (await world.post(stream=True)).status
        await world.settled()
        assert 429 == (await world.post(stream=True)).status

    run(use, HOSTED, limits=(budget(1, oversize="reject"),))


def test_a_budget_of_nothing_lets_nothing_pass() -> None:
    """Not even one call, though a guess is held down to what a budget has."""

    async def use(world: World) -> None:
        got = await world.post(stream=True)
        assert (429, "rate_limit_error") == shape(got)
        assert "false" == got.headers["x-should-retry"]
        assert "of at most $0.00 for this month (UTC), so it can never be admitted" in got.json["error"]["message"]
        assert [] == world.provider.requests

    run(use, with_settings(HOSTED, quotas={"spend": 0}), limits=(budget(),))


# ── Who is refused ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_budget_that_is_used_up_says_until_when() -> None:
    """At once, in dollars, and not to be tried again; next month the same call passes."""

    async def use(world: World) -> None:
        world.clock.set(NOVEMBER)
        world.provider.answers(answer(70_000))
        await world.post(stream=True)
        await world.settled()
        got = await world.post(stream=True)

        assert (429, "billing_error") == shape(got)
        assert "false" == got.headers["x-should-retry"]
        assert {"error_code": "budget_exhausted"} == got.json["error"]["details"]
        told = got.json["error"]["message"]
        assert told.startswith("spend: the budget of $1.00 for this month (Europe/Berlin) is used up ($1.05")
        assert told.endswith("; it is renewed at 2026-11-30T23:00:00Z")
        end_ms = int(datetime(2026, 11, 30, 23, tzinfo=UTC).timestamp() * 1000)
        assert str((end_ms - NOVEMBER) // 1000) == got.headers["retry-after"]
        assert 1 == len(world.provider.requests)
        world.clock.set(end_ms)
        assert 200 == (await world.post(stream=True)).status

    run(use, HOSTED, limits=(budget(1_00, tz="Europe/Berlin"),))


def test_a_budget_that_calls_under_way_hold_is_not_used_up() -> None:
    """Whoever is refused for them alone is told to come back soon, and then passes."""
    hold = Hold()

    async def use(world: World) -> None:
        world.provider.answers(Answer(events=[hold, *events_of(5)]), answer(5))
        first = asyncio.ensure_future(world.post(stream=True, max_tokens=128_000))
        await hold.reached()
        got = await world.post(stream=True, max_tokens=128_000)

        assert (429, "rate_limit_error") == shape(got)
        assert "x-should-retry" not in got.headers
        assert 5 <= int(got.headers["retry-after"]) <= 6
        assert "calls under way hold the rest of $0.10 for this month (UTC)" in got.json["error"]["message"]
        hold.release()
        await first
        await world.settled()
        assert 200 == (await world.post(stream=True)).status

    run(use, HOSTED, limits=(budget(10),))


@settings(max_examples=40)
@given(outputs=st.lists(st.integers(0, 6_000), min_size=2, max_size=30), cents=st.integers(1, 60))
def test_calls_at_once_spend_little_more_than_there_is(
    world_in_play: tuple[World, Play[Any]], outputs: list[int], cents: int
) -> None:
    """However many come at once: a budget is exceeded by what answers were longer than was held for them, if at all."""
    world, play = world_in_play

    async def use() -> None:
        world.clock.advance(ms=32 * 86_400_000)  # another month, in which nothing is spent yet
        world.meter.policy = Policy(limits=[budget(cents)])
        world.gateway._admission.spending = spending_of(BillingSettings(fallback="none"), [], world.clock)
        world.provider.answers(*[answer(each) for each in outputs])
        got = await asyncio.gather(*[world.post(stream=True, max_tokens=128_000) for _ in outputs])
        await world.settled()
        world.provider._scripts.clear()
        spent, held = await standing(world)
        passed = sum(each.status == 200 for each in got)
        longer = sum(max(0, each - OUTPUT_TOKENS) for each in outputs) * OUT

        assert 0 == held
        assert spent <= cents * CENT + longer + (max(outputs) + 1_000) * OUT * (cents < 7)
        assert min(len(outputs), max(1, cents * CENT // ((OUTPUT_TOKENS + 50) * OUT))) <= passed

    play(use())


@pytest.fixture(scope="module")
def world_in_play() -> Any:
    with lasting(HOSTED, limits=(budget(),)) as both:
        yield both


@pytest.mark.parametrize("unpriced", ["deny", "allow"])
def test_a_model_without_a_price_is_refused_unless_it_is_let_pass(unpriced: Any) -> None:
    """A cap that another model's name walks around would be none; who wants it so, says so."""

    async def use(world: World) -> None:
        got = await world.post(message(model="claude-nova-9"))
        await world.settled()

        if unpriced == "deny":
            assert (400, "invalid_request_error") == shape(got)
            assert {"error_code": "model_unpriced"} == got.json["error"]["details"]
            assert "spend: model 'claude-nova-9' has no price" in got.json["error"]["message"]
            assert "billing" in got.json["error"]["message"]
            assert ([], []) == (world.provider.requests, await world.entries())
        else:
            assert 200 == got.status
            assert (0, 0) == await standing(world)
        assert 200 == (await world.post()).status

    run(use, HOSTED, limits=(budget(),), billing=BillingSettings(fallback="none", unpriced=unpriced))


def test_a_budget_for_some_models_leaves_others_alone() -> None:
    """Whoever is not counted needs no price."""

    async def use(world: World) -> None:
        assert 200 == (await world.post(message(model="claude-nova-9"))).status

    run(use, HOSTED, limits=(budget(match={"model": "claude-opus-*"}),))


def test_a_model_that_serves_without_a_price_keeps_what_was_held() -> None:
    """The provider chose another one, of which nobody knows what it costs: that is not nothing."""

    async def use(world: World) -> None:
        served = stream(usage_start={"input_tokens": 9}, usage_end={"output_tokens": 9}, model="claude-nova-9")
        world.provider.answers(Answer(events=served))
        await world.post(stream=True, max_tokens=100)
        await world.settled()
        spent, held = await standing(world)

        assert (100 * OUT < spent, 0) == (True, held)

    run(use, HOSTED, limits=(budget(),))


def test_without_a_store_a_budget_is_unavailable() -> None:
    """Told from being used up: clients come back."""

    async def use(world: World) -> None:
        got = await world.post()

        assert (429, "billing_error") == shape(got)
        assert {"error_code": "budget_unavailable"} == got.json["error"]["details"]
        assert "x-should-retry" not in got.headers
        assert 1 <= int(got.headers["retry-after"]) <= 3
        assert [] == world.provider.requests

    run(use, HOSTED, limits=(budget(),), store="redis://127.0.0.1:1/0", options=HASTY)


# ── Elsewhere ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_middleware_has_budgets_too(tmp_path: Path) -> None:
    """With what tells the prices of a configuration."""
    (tmp_path / "meterlib.toml").write_text(
        '[[limit]]\nname = "spend"\nunit = "cost_nanousd"\nquota = 1_000_000_000\nperiod = "month"\n'
    )
    pieces = [part for part in answer(70_000).pieces() if isinstance(part, bytes)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"".join(pieces)})

    async def main() -> None:
        async with a_meter() as meter:
            spending = spending_for(Config.load(tmp_path / "meterlib.toml"))
            wrapped = MeteringMiddleware(app, meter, lambda scope: Who("acme", {}), spending=spending)
            assert [200, 429] == [await asked(wrapped), await asked(wrapped, quota=meter)]

    asyncio.run(main())


def test_the_middleware_holds_more_for_a_long_stream_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice what was seen of it, as soon as that is more than was expected."""
    monkeypatch.setattr("meterlib.gateway.asgi.TEND_S", 0)
    begun, text = start({"input_tokens": 1_000, "output_tokens": 1}), said("x" * 4 * 5_000, characters=1000)
    told = Answer(events=[begun, *text, delta({"output_tokens": 9_000}), {"type": "message_stop"}])
    (tmp_path / "meterlib.toml").write_text(
        '[[limit]]\nname = "spend"\nunit = "cost_nanousd"\nquota = 1_000_000_000\nperiod = "month"\n'
    )

    async def main() -> None:
        async with a_meter() as meter:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                headers = [(b"content-type", b"text/event-stream")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                *pieces, rest, last = [part for part in told.pieces() if isinstance(part, bytes)]
                for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                async with asyncio.timeout(10):
                    while 1_000 * IN + 2 * 4_250 * OUT != (await meter.peek("acme", {}))[0].held:
                        await asyncio.sleep(0.005)
                await send({"type": "http.response.body", "body": rest + last})

            spending = spending_for(Config.load(tmp_path / "meterlib.toml"))
            wrapped = MeteringMiddleware(app, meter, who=lambda scope: Who("acme", {}), spending=spending)
            assert 200 == await asked(wrapped, max_tokens=128_000)
            state = (await meter.peek("acme", {}))[0]
            assert (1_000 * IN + 9_000 * OUT, 0) == (state.used, state.held)

    asyncio.run(main())


async def asked(app: Any, quota: AsyncMeter | None = None, **fields: Any) -> int:
    """The status of an answer to a message; the quota is a dollar from then on."""
    if quota:
        quota.policy = Policy(limits=[budget(1_00)])
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(message(**fields)).encode(), "more_body": False}

    async def send(told: Any) -> None:
        sent.append(told)

    await app({"type": "http", "method": "POST", "path": "/v1/messages", "headers": []}, receive, send)
    return int(sent[0]["status"])


def test_a_unit_that_no_call_tells_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who writes `cost_usd` has a limit that never denies."""
    file = tmp_path / "meterlib.toml"
    head = f'[store]\nurl = "memory://"\n[gateway]\nkey_file = "{tmp_path}/key"\n'
    for unit, told in [("cost_usd", True), ("cost_nanousd", False), ("total_tokens", False)]:
        file.write_text(f'{head}[[limit]]\nname = "a"\nunit = "{unit}"\nquota = 1\nperiod = "day"\n')
        gateway_for(Config.load(file), {})
        out, err = capsys.readouterr()

        assert told == ("limit.counts_nothing" in out + err)


def test_a_price_book_that_cannot_be_read_is_found_at_the_start(tmp_path: Path) -> None:
    """Only where it is needed."""
    file = tmp_path / "meterlib.toml"
    file.write_text('[store]\nurl = "memory://"\n[gateway]\nkey_file = "key"\n[billing]\nbook = "none.toml"\n')
    gateway_for(Config.load(file), {})
    file.write_text(file.read_text() + '[[limit]]\nname = "a"\nunit = "cost_nanousd"\nquota = 1\nperiod = "day"\n')
    with pytest.raises(PolicyError, match=r"none\.toml cannot be read"):
        gateway_for(Config.load(file), {})


def test_the_example_is_a_budget(tmp_path: Path) -> None:
    """As the README tells it: 2,500 dollars for one tenant, at its own prices, and 100 for all others."""
    example = (Path(__file__).parents[2] / "README.md").read_text().split("<!-- budget -->\n```toml\n")[1]
    (tmp_path / "meterlib.toml").write_text(example.split("```")[0])
    config = Config.load(tmp_path / "meterlib.toml")
    spending = spending_for(config)
    assert spending
    used = Usage(input_tokens=1_000_000, output_tokens=0)
    costs = [
        spending.of_call(name, "hosted", {"model": "claude-haiku-4-5"}, 10, None).at_last(
            used, None, NOVEMBER, whole=True
        )
        for name in ("acme", "globex")
    ]
    compiled = CompiledPolicy(config.policy)
    quotas = [compiled.limits_of(name, {})[0].quota for name in ("acme", "globex")]

    assert ["$2,500.00", "$100.00"] == [usd(quota) for quota in quotas]
    assert ["$0.90", "$1.00"] == [usd(each.amounts[COST]) for each in costs]
    assert "deny" == spending.unpriced


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0.00"),
        (1_250 * DOLLAR, "$1,250.00"),
        (31_234_567, "$0.0312"),
        (99_999, "$0.000099999"),
        (-5 * CENT, "-$0.05"),
        (-1, "-$0.000000001"),
    ],
)
def test_dollars_are_told_as_people_read_them(amount: int, text: str) -> None:
    """No amount looks like nothing."""
    assert text == usd(amount)
