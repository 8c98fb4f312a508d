"""What `meterlib.toml` may say, and what is answered to whatever it may not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from meterlib import AsyncMeter, Limit, Meter, Policy, PolicyError, StoreOptions, Tenant
from meterlib.config import FILE_BYTES_MAX, Config, StoreSettings

LIMIT = '[[limit]]\nname = "requests"\nquota = 5\nwindow = "1m"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "meterlib.toml"


def refused(file: Path, text: str | bytes) -> PolicyError:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PolicyError) as caught:
        Config.load(file)

    assert str(file) in str(caught.value)
    assert "`" not in str(caught.value), "jargon of the decoder"
    return caught.value


# ── What is read ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    """Every setting has a default, so a file says only what is different."""
    file.write_text("")

    loaded = Config.load(file)

    assert Policy() == loaded.policy
    assert StoreSettings(url=f"embedded://{file.parent}/meterlib-data") == loaded.store


def test_each_setting_of_the_store_reaches_the_meter(file: Path) -> None:
    """What the file says of the store is what a meter made from it uses."""
    file.write_text(
        '[store]\nurl = "memory://"\nshards = 2\nprefix = "shop"\nretention_ms = 60_000\ntimeout_ms = 7\n'
        "deadline_ms = 70\nconnections_max = 3\nsweep_max = 9\n"
        'when_down = "allow"\njournal = "j"\nsweep_interval_ms = 0\n'
    )

    store = Config.load(file).store

    assert (2, "shop", 60_000, 7, 70, 3, 9) == (
        store.options.shards,
        store.options.prefix,
        store.options.retention_ms,
        store.options.timeout_ms,
        store.options.deadline_ms,
        store.options.connections_max,
        store.options.sweep_max,
    )
    assert ("allow", 0) == (store.when_down, store.sweep_interval_ms)
    with Config.load(file).connect() as meter:
        assert 2 == meter.shards


def test_the_settings_of_a_store_have_the_defaults_of_its_options() -> None:
    """A meter made in code and one made from an empty file use the store alike."""
    assert StoreOptions() == Config().store.options


async def _async_meter(config: Config) -> AsyncMeter:
    async with config.connect_async() as meter:
        await meter.reserve("acme")
    return meter


def test_sync_and_async_meters_come_from_one_file(file: Path) -> None:
    """One file serves both faces."""
    file.write_text(f'{LIMIT}[store]\nurl = "memory://"\n')
    config = Config.load(file)

    assert isinstance(asyncio.run(_async_meter(config)), AsyncMeter)
    with config.connect() as meter:
        assert isinstance(meter, Meter)
        assert config.policy == meter.policy


def test_limits_and_tenants_make_the_policy(file: Path) -> None:
    """The file's limits and tenants are the policy's, in the file's order."""
    tenants = '[[tenant]]\nname = "acme"\nquotas = { requests = 9 }\nfunding = "own"\n'
    file.write_text(LIMIT + LIMIT.replace("requests", "more") + tenants)

    policy = Policy.load(str(file))

    assert ["requests", "more"] == [limit.name for limit in policy.limits]
    assert [Tenant(name="acme", quotas={"requests": 9}, funding="own")] == list(policy.tenants)


def test_a_limit_of_a_file_equals_the_same_one_made_in_code(file: Path) -> None:
    """Whether a policy changed can be told by comparing."""
    file.write_text(LIMIT + 'per = ["provider", "key"]\nmatch = { model = ["a*", "b"], provider = "x" }\n')
    match = {"model": ("a*", "b"), "provider": "x"}
    limit = Limit(name="requests", quota=5, window="1m", per=("provider", "key"), match=match)

    assert Policy(limits=(limit,)) == Config.load(file).policy


def test_a_preset_comes_before_the_own_limits(file: Path) -> None:
    """A preset is a start, and tenants may change its quotas."""
    own = LIMIT.replace("requests", "own")
    tenant = '[[tenant]]\nname = "acme"\nquotas = { input_tokens = 1, own = 2 }\n'
    file.write_text(f'preset = "buildkite-anthropic"\n{own}{tenant}')

    assert ["requests", "input_tokens", "own"] == [limit.name for limit in Config.load(file).policy.limits]


def test_places_are_meant_from_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command finds the same store from whichever folder it is called."""
    folder = tmp_path / "a folder?"
    folder.mkdir()
    (folder / "meterlib.toml").write_text('[store]\nurl = "embedded://./da%20ta"\njournal = "journal.jsonl"\n')
    monkeypatch.chdir(tmp_path)

    store = Config.load("a folder?/meterlib.toml").store

    assert f"embedded://{tmp_path}/a%20folder%3F/da%20ta" == store.url
    assert str(folder / "journal.jsonl") == store.journal


def test_absolute_places_are_left_as_they_are(file: Path) -> None:
    """A URL of a server is nobody's to change."""
    file.write_text('[store]\nurl = "redis://localhost:6379/0"\njournal = "/var/lib/journal"\n')

    store = Config.load(file).store

    assert ("redis://localhost:6379/0", "/var/lib/journal") == (store.url, store.journal)


def test_the_named_file_is_taken_before_the_one_here_and_that_before_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which settings are in force can be told by looking at the command and the folder."""
    monkeypatch.chdir(tmp_path)
    assert Config() == Config.find()

    Path("meterlib.toml").write_text("[store]\nshards = 3\n")
    assert 3 == Config.find().store.shards

    Path("other.toml").write_text("[store]\nshards = 4\n")
    assert 4 == Config.find("other.toml").store.shards

    with pytest.raises(PolicyError, match=r"absent\.toml cannot be read: No such file"):
        Config.find("absent.toml")


def test_a_byte_order_mark_is_no_error(file: Path) -> None:
    """Some editors begin files with one."""
    file.write_bytes(b"\xef\xbb\xbf[store]\r\nshards = 2\r\n")

    assert 2 == Config.load(file).store.shards


# ── What is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        (LIMIT + 'windo = "1m"', "limit[0].windo", "no such setting; did you mean 'window'?"),
        ("[stor]", "stor", "did you mean 'store'?"),
        ("[store]\nshard = 1", "store.shard", "did you mean 'shards'?"),
        ("[[tenants]]", "tenants", "did you mean 'tenant'?"),
        ('[[tenant]]\nname = "a"\nquota = 3', "tenant[0].quota", "did you mean 'quotas'?"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest_known_one(file: Path, text: str, path: str, says: str) -> None:
    """A mistyped setting is never silently ignored."""
    error = refused(file, text)

    assert path == error.path
    assert says in str(error)
    assert "valid: " in str(error)


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ('[[limit]]\nname = "a"', "limit[0].quota", "is missing; a whole number is needed"),
        (LIMIT.replace("5", '"5"'), "limit[0].quota", "a whole number is needed, not '5'"),
        (LIMIT.replace("5", "1e3"), "limit[0].quota", "not 1000.0; write 1000"),
        (LIMIT.replace("5", "1.5"), "limit[0].quota", "not 1.5"),
        (LIMIT.replace("5", "true"), "limit[0].quota", "not true"),
        (LIMIT.replace("5", "-1"), "limit[0].quota", "0 to 2^53 - 1"),
        (LIMIT.replace("5", "1" + "0" * 20), "limit[0].quota", "0 to 2^53 - 1"),
        (LIMIT.replace("1m", "1 minute"), "limit[0].window", "'1 minute' is no duration; write"),
        (LIMIT + "per = 'provider'", "limit[0].per", "a list is needed, not 'provider'; write ['provider']"),
        (LIMIT + "per = ['a', 3]", "limit[0].per[1]", "text is needed, not 3"),
        (LIMIT + "match = { model = 3 }", "limit[0].match.model", "text or a list is needed, not 3"),
        (LIMIT + "match = { model = ['a', 3] }", "limit[0].match.model[1]", "text is needed, not 3"),
        (LIMIT + "open = 1", "limit[0].open", "true or false is needed, not 1"),
        (LIMIT + "period = 'months'", "limit[0].period", "day, hour, month, week is needed, not 'months'"),
        (LIMIT + "period = 'month'", "limit[0]", "found window and period"),
        (LIMIT + LIMIT, "limit[1].name", "'requests' is the name of limit[0] already"),
        (LIMIT + "shared = true", "limit[0].shared", "needs [store] shards = 1, and there are 16"),
        ('[limit]\nname = "a"', "limit", "begin each with [[limit]]"),
        ("limit = 5", "limit", "a list is needed, not 5"),
        ("limit = [5]", "limit[0]", "a table is needed, not 5"),
        ("[[store]]", "store", "begin it with [store]"),
        ("[store]\nshards = 0", "store.shards", "allowed, not 0"),
        ("[store]\nsweep_interval_ms = -1", "store.sweep_interval_ms", "0 to 3600000 are allowed, not -1"),
        ("[store]\ntimeout_ms = 9000", "store.deadline_ms", "5000 is less than timeout_ms = 9000"),
        ("[store]\nprefix = 'a{b}'", "store.prefix", "'a{b}'"),
        ("[store]\njournal = ' '", "store.journal", "leave the setting out for none"),
        ("[store]\nwhen_down = 'alow'", "store.when_down", "did you mean 'allow'?"),
        ("[store]\nurl = 2026-01-01", "store.url", "text is needed, not a date"),
        ("[store]\nurl = 'localhost:6379'", "store.url", "must begin with one of redis://"),
        ("[store]\nurl = 'embedded://data'", "store.url", "embedded://./relative/folder"),
        ("preset = 'buildkite'", "preset", "'buildkite' is not one of buildkite-anthropic"),
        ("preset = 'buildkite-anthropic'\n" + LIMIT, "limit[0].name", "of the preset 'buildkite-anthropic' already"),
        ('[[tenant]]\nname = ""', "tenant[0].name", "is empty"),
        ('[[tenant]]\nname = "a"\nfunding = "hostd"', "tenant[0].funding", "did you mean 'hosted'?"),
        (LIMIT + '[[tenant]]\nname = "a"\nquotas = { request = 3 }', "tenant[0].quotas.request", "'requests'?"),
        (LIMIT + '[[tenant]]\nname = "a"\nquotas = { requests = "3" }', "tenant[0].quotas.requests", "not '3'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_what_is_allowed(file: Path, text: str, path: str, says: str) -> None:
    """An operator can mend a setting from the message alone."""
    error = refused(file, text)

    assert path == error.path
    assert says in str(error)


def test_the_first_own_limit_is_number_0_whatever_the_preset_has(file: Path) -> None:
    """Errors count the limits as the file does."""
    text = 'preset = "buildkite-anthropic"\n' + LIMIT.replace("requests", "own").replace("1m", "1y")

    assert "limit[0].window" == refused(file, text).path


@pytest.mark.parametrize(
    "url",
    [
        "redis:/:hunter2@h",
        "http://:hunter2@h",
        "embedded://hunter2",
        "redis://:hunter2@h:x",
        "redis://:hunter2@[::1",
        "redis+cluster://:hunter2@h/3",
        "redis://:hunter2/x@h",
        "rediss://:hunter2@h:0",
        "redis://:hunter2@h/x",
        "redis://h/0?password=hunter2&nonsense=1",
        "redis+cluster://:hunter2@h/0?nonsense=1",
        "redis+sentinel://:hunter2@h",
        "memory://hunter2",
        "unix://",
    ],
)
def test_a_url_that_is_refused_is_not_repeated(file: Path, url: str) -> None:
    """Errors end in logs, and a URL may hold a password."""
    assert "hunter2" not in str(refused(file, f'[store]\nurl = "{url}"'))
    assert "hunter2" not in str(refused(file, f'[store]\nurl = ["{url}"]'))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[store]\nshards = 1\nshards = 2", "line 3: a setting is given twice"),
        ("[store]\nshards = 1\n\n[store]\n", "line 4, column 7: the table [store] is begun twice"),
        ("[store]\nshards = ", "line 2"),
        ("a = 1\nb = = 2\n", "line 2, column 5"),
        ("a: !!python/object 1\n", "line 1, column 2"),
        (b'\n\nurl = "\xff"', "line 3: this is no UTF-8 text"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "1" * 5000, "far too many digits"),
        ("#" * (FILE_BYTES_MAX + 1), "larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_with_its_name_and_line(file: Path, text: str | bytes, says: str) -> None:
    """Whoever edits the file finds the place."""
    assert says in str(refused(file, text))


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    """Whatever cannot be read is said to be so."""
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        Config.load(tmp_path)


def test_settings_made_in_code_are_checked_too() -> None:
    """A mistake is found when the settings are made, never while serving."""
    with pytest.raises(PolicyError, match=r"store\.shards"):
        Config(store=StoreSettings(shards=0))
