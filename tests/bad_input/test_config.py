"""`meterlib.toml`: a mistake in it is found when it is read, by the path of the setting and with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from meterlib import Limit, Policy, PolicyError

FINE = '[[limit]]\nname = "requests"\nquota = 50\nwindow = "1m"\n'


def refusal(folder: Path, text: str | bytes) -> PolicyError:
    """The error of a file that is refused."""
    file = folder / "meterlib.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PolicyError) as refused:
        Policy.load(str(file))
    assert "meterlib.toml" in str(refused.value)
    return refused.value


def limit(**settings: str) -> str:
    """A `[[limit]]` that is fine but for these settings, written as TOML has them."""
    fine = {"name": '"requests"', "quota": "50", "window": '"1m"'}
    wanted = {name: text for name, text in (fine | settings).items() if text}
    return "[[limit]]\n" + "".join(f"{name} = {text}\n" for name, text in wanted.items())


def test_a_file_that_is_fine_is_read(tmp_path: Path) -> None:
    """What the other cases get wrong, right."""
    file = tmp_path / "meterlib.toml"
    file.write_text(FINE)

    assert Policy(limits=(Limit(name="requests", quota=50, window="1m"),)) == Policy.load(str(file))


@pytest.mark.parametrize(
    ("settings", "path", "problem"),
    [
        ({"quota": "-1"}, "limit[0].quota", "0 to 2^53 - 1"),
        ({"quota": "9007199254740992"}, "limit[0].quota", "0 to 2^53 - 1"),
        ({"quota": "50.0"}, "limit[0].quota", "write 50"),
        ({"quota": "nan"}, "limit[0].quota", "a whole number"),
        ({"quota": "inf"}, "limit[0].quota", "a whole number"),
        ({"quota": "true"}, "limit[0].quota", "not true"),
        ({"quota": '"50"'}, "limit[0].quota", "a whole number"),
        ({"quota": ""}, "limit[0].quota", "is missing"),
        ({"name": ""}, "limit[0].name", "is missing"),
        ({"name": '"a b"'}, "limit[0].name", "A-Z a-z 0-9 _ . -"),
        ({"window": '"0s"'}, "limit[0].window", "within 1ms and 31d"),
        ({"window": '"-1m"'}, "limit[0].window", "such as '1m'"),
        ({"window": '"32d"'}, "limit[0].window", "within 1ms and 31d"),
        ({"window": "60"}, "limit[0].window", "text is needed"),
        ({"window": ""}, "limit[0]", "found none"),
        ({"period": '"day"'}, "limit[0]", "found window and period"),
        ({"open": "true"}, "limit[0]", "found window and open"),
        ({"open": '"no"', "window": ""}, "limit[0].open", "true or false"),
        ({"unit": '"input tokens"'}, "limit[0].unit", "lower-case letters"),
        ({"window": "", "period": '"Month"'}, "limit[0].period", "day, hour, month, week"),
        ({"window": "", "period": '"day"', "tz": '"Mars"'}, "limit[0].tz", "'Europe/Berlin'"),
        ({"window": "", "period": '"day"', "tz": "1"}, "limit[0].tz", "text is needed"),
        ({"per": '"provider"'}, "limit[0].per", "write ['provider']"),
        ({"per": "[1]"}, "limit[0].per[0]", "text is needed"),
        ({"per": '["a", "a"]'}, "limit[0].per", "twice"),
        ({"match": "1"}, "limit[0].match", "a table"),
        ({"match": "{ provider = 1 }"}, "limit[0].match.provider", "text"),
        ({"oversize": '"rejct"'}, "limit[0].oversize", "'reject'"),
        ({"on_expiry": '"free"'}, "limit[0].on_expiry", "only a period"),
        ({"qouta": "5"}, "limit[0].qouta", "'quota'"),
        ({"shared": "true"}, "limit[0].shared", "shards = 1"),
    ],
)
def test_a_limits_settings_are_checked_as_in_code(
    tmp_path: Path, settings: dict[str, str], path: str, problem: str
) -> None:
    """A number as text, a span too many, a misspelt name: each is told by its path."""
    error = refusal(tmp_path, limit(**settings))

    assert path == error.path
    assert problem in str(error)


@pytest.mark.parametrize(
    ("text", "path", "problem"),
    [
        (FINE + FINE, "limit[1].name", "limit[0] already"),
        ("".join(limit(name=f'"limit_{n}"') for n in range(17)), "limit", "at most 16 limits, not 17"),
        (FINE.replace("[[limit]]", "[limit]"), "limit", "[[limit]]"),
        (FINE.replace("[[limit]]", "[[limits]]"), "limits", "'limit'"),
        (FINE + '[[tenant]]\nname = "a"\nquotas = { request = 5 }\n', "tenant[0].quotas.request", "'requests'"),
        (FINE + '[[tenant]]\nname = "a"\nquotas = { requests = -5 }\n', "tenant[0].quotas.requests", "0 to 2^53 - 1"),
        (FINE + '[[tenant]]\nname = "a"\nquotas = { requests = 5.5 }\n', "tenant[0].quotas.requests", "whole number"),
        ('[[tenant]]\nname = ""\n', "tenant[0].name", "empty"),
        ('[[tenant]]\nname = "a\\nb"\n', "tenant[0].name", "cannot be printed"),
        ('[[tenant]]\nname = "a"\n[[tenant]]\nname = "a"\n', "tenant[1].name", "twice"),
        ('[[tenant]]\nname = "a"\nfunding = "mine"\n', "tenant[0].funding", "hosted, own"),
        ("[store]\nshards = 0\n", "store.shards", "1 to 4096"),
        ("[store]\nshards = 1.5\n", "store.shards", "whole number"),
        ('[store]\nprefix = "{}"\n', "store.prefix", "A-Z a-z 0-9"),
        ('[store]\nwhen_down = "alow"\n', "store.when_down", "'allow'"),
        ("[store]\nwhen_down = true\n", "store.when_down", "allow, deny"),
        ("[store]\nshard = 1\n", "store.shard", "'shards'"),
        ('store = "redis://h"\n', "store", "a table"),
        ('preset = "buildkite"\n', "preset", "buildkite-anthropic"),
        ('preset = "buildkite-anthropic"\n' + FINE, "limit[0].name", "preset"),
        ('[[limt]]\nname = "a"\n', "limt", "'limit'"),
    ],
)
def test_a_files_tables_are_checked_alike(tmp_path: Path, text: str, path: str, problem: str) -> None:
    """Limits, tenants and the store: an error leads to the line to change."""
    error = refusal(tmp_path, text)

    assert path == error.path
    assert problem in str(error)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (FINE + "quota = 51\n", "line 5"),
        ("[store]\n[store]\n", "line 2"),
        ("quota = \n", "line 1"),
        ("[[limit]\n", "line 1"),
        (b"name = '\xff'\n", "line 1"),
        ('name = "\ud800"\n', "no UTF-8"),
        ("a = " + "9" * 5000, "too many digits"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("#" * (1 << 20) + "\n" + FINE, "larger than"),
    ],
    ids=[
        "duplicate key",
        "duplicate table",
        "no value",
        "no bracket",
        "latin-1",
        "surrogate",
        "digits",
        "depth",
        "size",
    ],
)
def test_what_is_no_toml_is_told_by_its_line(tmp_path: Path, text: str | bytes, problem: str) -> None:
    """A file that cannot be read is an error of the policy, never a traceback of the parser."""
    assert problem in str(refusal(tmp_path, text))


@pytest.mark.parametrize("name", ["missing.toml", ""])
def test_a_file_that_is_not_there_is_told_by_its_name(tmp_path: Path, name: str) -> None:
    """No file is no policy that lets everything pass."""
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(str(tmp_path / name))


@pytest.mark.parametrize(
    "url",
    [
        "redis//u:hunter2@h",
        "http://u:hunter2@h",
        "embedded://u:hunter2@data",
        "redis://u:hunter2@h:port",
        "redis+cluster://u:hunter2@h:1/3",
    ],
)
def test_a_stores_address_is_checked_without_repeating_its_password(tmp_path: Path, url: str) -> None:
    """The error of a wrong URL can be logged as it is."""
    error = refusal(tmp_path, f'[store]\nurl = "{url}"\n')

    assert "store.url" == error.path
    assert "hunter2" not in str(error)
