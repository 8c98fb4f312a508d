"""Settlements that wait where the gateway puts them by default are looked for there, by whoever asks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meterlib import Usage
from meterlib.cli import main
from meterlib.config import GATEWAY_JOURNAL, Config, StoreSettings
from meterlib.core.ledger import Settlement
from meterlib.store.journal import Journal


def waits(file: Path) -> None:
    """One settlement waits in a journal."""
    Journal(file).append(Settlement(tenant="acme", reservation_id="r", usage=Usage(input_tokens=1)))


@pytest.mark.parametrize("named", [True, False])
def test_the_doctor_finds_what_waits(named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the journal that is named, and without a name in that of the gateway; which is in the store's folder."""
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    waits(tmp_path / "mine" if named else data / GATEWAY_JOURNAL)
    file = tmp_path / "meterlib.toml"
    file.write_text('[store]\nurl = "embedded://./data"\nshards = 1\n' + ('journal = "mine"\n' if named else ""))

    assert 0 == main(["doctor", "--json", "--config", str(file)])

    (found,) = [one for one in json.loads(capsys.readouterr().out)["findings"] if one["check"] == "journal"]
    assert ("warning", True) == (found["status"], found["found"].startswith("1 settlements wait in "))


def test_a_named_journal_goes_before_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where there is none, none is looked at; that of other stores is where the gateway runs."""
    monkeypatch.chdir(tmp_path)
    shared = Config(store=StoreSettings(url="redis://127.0.0.1:1"))
    assert None is shared.journal
    waits(tmp_path / GATEWAY_JOURNAL)
    assert GATEWAY_JOURNAL == shared.journal
    assert "mine" == Config(store=StoreSettings(url="redis://127.0.0.1:1", journal="mine")).journal
    assert None is Config(store=StoreSettings(url=f"embedded://{tmp_path}/data")).journal
