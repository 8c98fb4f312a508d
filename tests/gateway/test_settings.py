"""The settings of the gateway and its tenants: all documented, all bounded; what is wrong is said with its path."""

from __future__ import annotations

import inspect
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib.config import Config
from meterlib.errors import PolicyError
from meterlib.gateway.app import NEEDS_RESTART
from meterlib.gateway.tokens import hash_of
from meterlib.settings import GatewaySettings, TenantSettings, TokenSettings, check_tenants, tokens_of

HASH = hash_of("ml_x")
NUMBERS = {field.name: field.default for field in msgspec.structs.fields(GatewaySettings) if type(field.default) is int}
CANARY = "sk-ant-canary-0001"


def loaded(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "meterlib.toml"
    file.write_text(text)
    return Config.load(file)


def refused(tmp_path: Path, text: str) -> PolicyError:
    with pytest.raises(PolicyError) as raised:
        loaded(tmp_path, text)
    return raised.value


@pytest.mark.parametrize("kind", [GatewaySettings, TenantSettings, TokenSettings])
def test_every_setting_is_documented(kind: type[msgspec.Struct]) -> None:
    """In the order in which they stand, and none that is not there."""
    documented = re.findall(r"^    ([a-z_]+): ", inspect.getdoc(kind) or "", re.MULTILINE)
    own = [each.name for each in msgspec.structs.fields(kind) if each.name in kind.__annotations__]

    assert own == documented


def test_the_defaults_serve_one_developer() -> None:
    """No file at all: on this machine only, to the Claude API, whoever brings a key; and they pass their own checks."""
    settings = Config().gateway

    assert ("127.0.0.1", 8787) == settings.address
    assert ("https://api.anthropic.com", None, True) == (
        settings.upstream,
        settings.callers,
        settings.count_invalid_requests,
    )
    assert (32 << 20, True) == (settings.body_bytes_max, settings.keepalive_ms >= 65_000)
    assert settings.upstream_connect_timeout_ms == 5_000
    assert settings.upstream_idle_timeout_ms >= 300_000
    assert settings.upstream_timeout_ms >= 600_000


def test_what_needs_a_restart_is_a_setting() -> None:
    assert set(NEEDS_RESTART) <= {field.name for field in msgspec.structs.fields(GatewaySettings)}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 10**12, 2**63 - 1, True, "5", 1.5, []])
def test_every_number_has_bounds(tmp_path: Path, name: str, value: Any) -> None:
    """In a file and in code; the error names the setting."""
    told = {True: "true", "5": '"5"', 1.5: "1.5"}.get(value) if not isinstance(value, list) else "[]"

    assert f"gateway.{name}" == refused(tmp_path, f"[gateway]\n{name} = {told or value}\n").path
    with pytest.raises(PolicyError) as raised:
        GatewaySettings(**{name: value})
    assert f"gateway.{name}" == raised.value.path


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("listen", '"8787"'),
        ("listen", '":8787"'),
        ("listen", '"127.0.0.1:x"'),
        ("listen", '"127.0.0.1:65536"'),
        ("listen", '"127.0.0.1:-1"'),
        ("listen", '"127.0.0.1:\u0661"'),
        ("listen", f'"127.0.0.1:{"9" * 5000}"'),
        ("base_path", '"v1"'),
        ("base_path", '"/v1/"'),
        ("base_path", '"/a b"'),
        ("base_path", '"/a/../b"'),
        ("base_path", '"/%2f"'),
        ("base_path", '"/a?b"'),
        ("upstream", '"api.anthropic.com"'),
        ("upstream", '"ftp://api.anthropic.com"'),
        ("upstream", '"https://"'),
        ("upstream", '"https://host:0"'),
        ("upstream", '"https://host:x"'),
        ("upstream", '"https://[::1"'),
        ("upstream", '"https://host/?a=b"'),
        ("upstream", '"https://host/#a"'),
        ("upstream", '"https://host/a/../b"'),
        ("upstream", '"https://@host"'),
        ("upstream_key_env", '""'),
        ("upstream_key_env", '"MY KEY"'),
        ("provider", '""'),
        ("provider", '" anthropic"'),
        ("provider", '"a\\nb"'),
        ("provider", '"sk-ant"'),
        ("provider", f'"{"x" * 300}"'),
        ("callers", '"everybody"'),
        ("tenant", '""'),
        ("tenant", '"a\\u0000"'),
        ("tenant", f'"{"x" * 129}"'),
        ("key_file", '""'),
        ("models", '[""]'),
        ("models", '["a b"]'),
        ("models", '"claude-*"'),
        ("betas", '["a,b"]'),
        ("ratelimit_headers", '"theirs"'),
        ("on_disconnect", '"wait"'),
        ("count_invalid_requests", "1"),
        ("attributes", "[]"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_path(tmp_path: Path, setting: str, value: str) -> None:
    """When the file is read, and not when the first call comes."""
    error = refused(tmp_path, f"[gateway]\n{setting} = {value}\n")

    assert error.path.startswith(f"gateway.{setting}")
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    "told",
    [
        {"listen": 8787},
        {"upstream": None},
        {"base_path": b"/x"},
        {"provider": 1},
        {"callers": 1},
        {"models": "claude"},
        {"models": [1]},
        {"betas": "x"},
        {"attributes": ["a"]},
        {"attributes": {"a": 1}},
        {"tenant": 5},
        {"on_disconnect": True},
        {"count_invalid_requests": "yes"},
    ],
    ids=str,
)
def test_wrong_types_in_code_are_settings_that_are_wrong(told: dict[str, Any]) -> None:
    """And no error of another kind."""
    with pytest.raises(PolicyError) as raised:
        GatewaySettings(**told)
    assert raised.value.path.startswith(f"gateway.{next(iter(told))}")


@pytest.mark.parametrize(
    ("attributes", "path"),
    [
        ({"tenant": "x-a"}, "gateway.attributes.tenant"),
        ({"provider": "x-a"}, "gateway.attributes.provider"),
        ({"model": "x-a"}, "gateway.attributes.model"),
        ({"key": "x-a"}, "gateway.attributes.key"),
        ({"a b": "x-a"}, "gateway.attributes.a b"),
        ({"a": "x a"}, "gateway.attributes.a"),
        ({"a": ""}, "gateway.attributes.a"),
        ({"a": "Authorization"}, "gateway.attributes.a"),
        ({"a": "x-api-key"}, "gateway.attributes.a"),
        ({"a": "cookie"}, "gateway.attributes.a"),
        ({f"a{at}": "x-a" for at in range(18)}, "gateway.attributes"),
    ],
)
def test_attributes_can_be_neither_secrets_nor_our_own(attributes: dict[str, str], path: str) -> None:
    """A header with a credential would reach the store."""
    with pytest.raises(PolicyError) as raised:
        GatewaySettings(attributes=attributes)
    assert path == raised.value.path


@pytest.mark.parametrize(
    ("name", "meant"),
    [("body_byte_max", "body_bytes_max"), ("upsteam", "upstream"), ("beta", "betas"), ("keepalive", "keepalive_ms")],
)
def test_an_unknown_name_names_the_nearest(tmp_path: Path, name: str, meant: str) -> None:
    error = refused(tmp_path, f"[gateway]\n{name} = 5\n")

    assert f"gateway.{name}" == error.path
    assert f"did you mean '{meant}'?" in str(error)


def test_an_unknown_setting_of_a_tenant_names_the_nearest(tmp_path: Path) -> None:
    error = refused(tmp_path, '[[tenant]]\nname = "acme"\ntoken = ["x"]\n')

    assert "tenant[0].token" == error.path
    assert "did you mean 'tokens'?" in str(error)


@pytest.mark.parametrize(
    ("tenants", "path"),
    [
        ([{"tokens": [CANARY]}], "tenant[0].tokens[0]"),
        ([{"tokens": [HASH.upper()]}], "tenant[0].tokens[0]"),
        ([{"tokens": [HASH, HASH]}], "tenant[0].tokens[1]"),
        ([{"tokens": [HASH]}, {"tokens": [HASH]}], "tenant[1].tokens[0]"),
        ([{"tokens": [TokenSettings(hash=CANARY)]}], "tenant[0].tokens[0]"),
        ([{"tokens": [HASH, TokenSettings(hash=HASH)]}], "tenant[0].tokens[1]"),
        ([{"tokens": [TokenSettings(hash=HASH, expires=datetime(2027, 1, 31))]}], "tenant[0].tokens[0].expires"),
        ([{"upstream_key_env": CANARY}], "tenant[0].upstream_key_env"),
        ([{"tokens": [HASH], "funding": "own"}], "tenant[0].upstream_key_env"),
        ([{"models": ["a b"]}], "tenant[0].models[0]"),
        ([{"models": "claude-*"}], "tenant[0].models"),
    ],
)
def test_tenants_that_make_no_sense(tenants: list[dict[str, Any]], path: str) -> None:
    """No token is two tenants', and nothing that may be a secret is repeated."""
    with pytest.raises(PolicyError) as raised:
        check_tenants([TenantSettings(name=f"t{at}", **told) for at, told in enumerate(tenants)])
    assert path == raised.value.path
    assert CANARY not in str(raised.value)


SECRETS = {
    "gateway.upstream": f'[gateway]\nupstream = "https://user:{CANARY}@host"\n',
    "gateway.upstream ": f'[gateway]\nupstream = ["{CANARY}"]\n',
    "gateway.upstream_key_env": f'[gateway]\nupstream_key_env = "{CANARY}"\n',
    "gateway.upstream_key_env ": f'[gateway]\nupstream_key_env = ["{CANARY}"]\n',
    "gateway.provider": f'[gateway]\nprovider = "{CANARY}"\n',
    "tenant[0].tokens": f'[[tenant]]\nname = "a"\ntokens = "{CANARY}"\n',
    "tenant[0].tokens[0]": f'[[tenant]]\nname = "a"\ntokens = ["{CANARY}"]\n',
    "tenant[0].tokens[0].token": f'[[tenant]]\nname = "a"\ntokens = [{{ token = "{CANARY}" }}]\n',
    "tenant[0].tokens[0] ": f'[[tenant]]\nname = "a"\ntokens = [{{ hash = "{CANARY}" }}]\n',
    "tenant[0].tokens[0].hash": f'[[tenant]]\nname = "a"\ntokens = [{{ hash = ["{CANARY}"] }}]\n',
    "tenant[0].upstream_key_env": f'[[tenant]]\nname = "a"\nupstream_key_env = "{CANARY}"\n',
    "tenant[0].upstream_key": f'[[tenant]]\nname = "a"\nupstream_key = "{CANARY}"\n',
    "gateway.api_key": f'[gateway]\napi_key = "{CANARY}"\n',
    "store.url": f'[store]\nurl = "redis:{CANARY}@host"\n',
    "store.url ": f'[store]\nurl = ["{CANARY}"]\n',
    "": f'[gateway]\napi_key = "{CANARY}\n',
}


@pytest.mark.parametrize(
    ("expires", "problem"),
    [
        ("2027-01-31", "a time such as 2027-01-31T00:00:00Z is needed, not a date"),
        ("2027-01-31T00:00:00", "a time with its offset from UTC is needed, such as 2027-01-31T00:00:00Z"),
        ('"90d"', "a time such as 2027-01-31T00:00:00Z is needed, not text"),
        ("90", "a time such as 2027-01-31T00:00:00Z is needed, not a whole number"),
    ],
)
def test_a_token_expires_at_a_moment(tmp_path: Path, expires: str, problem: str) -> None:
    """A day without a zone would be another moment on another machine."""
    told = '[[tenant]]\nname = "a"\nquotas = {}\ntokens = [{ hash = "' + HASH + '", expires = %s }]\n'

    error = refused(tmp_path, told % expires)
    assert ("tenant[0].tokens[0].expires", True) == (error.path, problem in str(error))

    (tenant,) = loaded(tmp_path, told % "2027-01-31T01:00:00+01:00").tenant
    assert [TokenSettings(hash=HASH, expires=datetime(2027, 1, 31, tzinfo=UTC))] == tokens_of(tenant)


@pytest.mark.parametrize("path", SECRETS)
def test_a_secret_in_the_wrong_place_is_never_repeated(tmp_path: Path, path: str) -> None:
    """Errors end up in logs."""
    error = refused(tmp_path, SECRETS[path])

    assert path.strip() == error.path
    assert CANARY not in str(error)
    assert CANARY not in repr(error)
    assert error.__cause__ is None


@given(
    text=st.text(max_size=40), field=st.sampled_from(["listen", "base_path", "upstream", "upstream_key_env", "tenant"])
)
def test_whatever_text_it_is(text: str, field: str) -> None:
    """A setting, or an error with its path."""
    try:
        told: dict[str, Any] = {field: text}
        settings = GatewaySettings(**told)
    except PolicyError as error:
        path = error.path
    else:
        path = f"gateway.{field}"
        assert 0 <= settings.address[1] <= 65_535
    assert f"gateway.{field}" == path


@pytest.mark.parametrize(
    ("listen", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80)), ("localhost:65535", ("localhost", 65535))],
)
def test_addresses_are_read(listen: str, address: tuple[str, int]) -> None:
    assert address == GatewaySettings(listen=listen).address


def test_a_file_says_everything(tmp_path: Path) -> None:
    """What the manual shows can be written."""
    text = f"""
[gateway]
listen = "0.0.0.0:80"
base_path = "/v3/ai/anthropic"
upstream = "https://api.anthropic.com/proxy"
callers = "known"
models = ["claude-*"]
betas = []
attributes = {{ pipeline = "X-Pipeline" }}
key_file = "keys/names"

[[tenant]]
name = "acme"
tokens = ["{HASH}"]
models = ["claude-sonnet-4-5"]
"""
    config = loaded(tmp_path, text)

    assert {"pipeline": "X-Pipeline"} == config.gateway.attributes
    assert str(tmp_path / "keys" / "names") == config.gateway.key_file
    assert [HASH] == list(config.tenant[0].tokens)
