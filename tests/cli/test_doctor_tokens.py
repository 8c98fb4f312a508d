"""What `meterlib doctor` says of tokens that expire, before callers find out."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from meterlib.cli import main
from meterlib.cli.doctor_tokens import SOON_S, examine
from meterlib.config import Config
from meterlib.gateway.tokens import hash_of
from meterlib.settings import TenantSettings, TokenSettings

EXPIRES = datetime(2027, 1, 31, tzinfo=UTC)
HASH = hash_of("ml_a-token")


def status(expires: datetime | None, before_s: float) -> list[str]:
    """What is found so many seconds before `EXPIRES`."""
    token = TokenSettings(hash=HASH, expires=expires)
    config = Config(tenant=[TenantSettings(name="acme", tokens=[token])])
    return [found.status for found in examine(config, EXPIRES.timestamp() - before_s)]


@pytest.mark.parametrize(
    ("before_s", "expected"), [(SOON_S + 1, "ok"), (SOON_S, "warning"), (1, "warning"), (0, "warning"), (-1, "warning")]
)
def test_a_token_is_warned_of_two_weeks_before_it_expires(before_s: float, expected: str) -> None:
    assert [expected] == status(EXPIRES, before_s)
    assert ["ok"] == status(None, before_s)


def test_without_tokens_nothing_is_said_of_them() -> None:
    assert [] == list(examine(Config(tenant=[TenantSettings(name="acme")]), 0.0))


def test_each_token_is_named_as_reports_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the attribute `key` of its calls; which of a tenant's it is, the settings tell by that too."""
    file = tmp_path / "meterlib.toml"
    hashes = [hash_of(f"ml_{at}") for at in range(3)]
    times = [datetime.now(UTC) + timedelta(days=days) for days in (-1, 3, 300)]
    tokens = [f'{{ hash = "{one}", expires = {at:%Y-%m-%dT%H:%M:%SZ} }}' for one, at in zip(hashes, times, strict=True)]
    file.write_text(
        f'[store]\nurl = "memory://"\n[[tenant]]\nname = "acme"\ntokens = [{", ".join(tokens)}, "{HASH}"]\n'
    )

    assert 0 == main(["doctor", "--json", "--config", str(file)])

    told: dict[str, Any] = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    old, soon = told[f"token {hashes[0][7:15]}"], told[f"token {hashes[1][7:15]}"]
    assert ("warning", "take it out of [[tenant]] tokens") == (old["status"], old["advice"])
    assert old["found"].startswith("of acme, has expired at ")
    assert ("warning", True) == (soon["status"], "meterlib token new --expires" in soon["advice"])
    assert soon["found"].startswith("of acme, expires at ")
    assert not [check for check in told if hashes[2][7:15] in check or HASH[7:15] in check]
