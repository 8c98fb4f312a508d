"""The commands before a store that is a cluster, is not there, or is not made yet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meterlib import StoreUnavailable, Usage
from meterlib.config import Config
from meterlib.store.connect import shown_url
from tests.support.commands import Run, runner
from tests.support.servers import Server, start_server

READS = [["report"], ["limits", "acme"], ["ledger", "show"]]
READ_IDS = [" ".join(words) for words in READS]
PATIENCE_S = 3.0  # less than the deadline of a call


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in the folder of this test."""
    monkeypatch.chdir(tmp_path)
    return runner(capsys)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start_server(tmp_path_factory.mktemp("cluster"), "valkey", cluster=True, append_only=True) as server:
        yield server


def settings(tmp_path: Path, url: str, more: str = "") -> Config:
    file = tmp_path / "meterlib.toml"
    file.write_text(f'preset = "buildkite-anthropic"\n[store]\nurl = "{url}"\n{more}')
    return Config.load(file)


# ── A cluster ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_doctor_examines_a_cluster(cluster: Server, run: Run, tmp_path: Path) -> None:
    """Operator: a cluster is examined as any other store, and its limits are proven without leaving a trace."""
    config = settings(tmp_path, f"redis+cluster://127.0.0.1:{cluster.port}", 'prefix = "examined"\n')
    with config.connect() as meter:
        meter.reserve("acme", {"provider": "anthropic"}).settle(Usage(input_tokens=1))

    ran = run("doctor", "--json")

    assert (0, {"failure": 0}) == (ran.code, {"failure": json.loads(ran.out)["counts"]["failure"]})
    assert ran.findings["server"]["found"].startswith("Valkey ")
    assert "maxmemory-policy is noeviction" == ran.findings["eviction"]["found"]
    assert "synced before each answer" in ran.findings["durability"]["found"]
    assert "1 entries, none missing" in ran.findings["ledger"]["found"]
    assert "50,000 input_tokens pass" in ran.findings["limit input_tokens"]["found"]
    with cluster.client() as client:
        assert [] == client.keys("*selftest*")


@pytest.mark.parametrize("words", READS, ids=READ_IDS)
def test_every_command_reads_a_cluster(cluster: Server, run: Run, tmp_path: Path, words: list[str]) -> None:
    """Finance: where the ledger is kept is no matter to who reads it."""
    config = settings(tmp_path, f"redis+cluster://127.0.0.1:{cluster.port}", f'prefix = "read-by-{words[0]}"\n')
    with config.connect() as meter:
        meter.reserve("acme", {"provider": "anthropic"}).settle(Usage(input_tokens=1))

    ran = run(*words)

    assert (0, "") == (ran.code, ran.err)
    assert ran.out


# ── A replica ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_replica_in_the_place_of_its_primary_is_told(run: Run, tmp_path: Path) -> None:
    """Operator: the calls of a meter say that it cannot be written to, and the doctor says what to do."""
    with start_server(tmp_path / "primary") as primary, start_server(tmp_path / "replica") as replica:
        with replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", primary.port)
        config = settings(tmp_path, replica.url, "timeout_ms = 100\ndeadline_ms = 150\nsweep_interval_ms = 0\n")
        with config.connect() as meter, pytest.raises(StoreUnavailable, match="write against a read only replica"):
            meter.reserve("acme", {"provider": "anthropic"})

        ran = run("doctor", "--json")

    assert 1 == ran.code
    assert "this is a replica: nothing can be written to it" == ran.findings["role"]["found"]


def test_a_cluster_that_is_gone_is_a_finding(run: Run, tmp_path: Path) -> None:
    """Operator: the doctor says that nobody is there, and does not fail itself."""
    settings(tmp_path, "redis+cluster://somebody:hunter2@127.0.0.1:1")

    ran = run("doctor", "--json")

    assert 1 == ran.code
    assert "redis+cluster://127.0.0.1:1" in ran.findings["store"]["found"]
    assert "hunter2" not in ran.out + ran.err


# ── Nobody there ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words", READS, ids=READ_IDS)
@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://somebody:hunter2@127.0.0.1:1/3", "redis://127.0.0.1:1/3"),
        ("redis+cluster://:hunter2@127.0.0.1:1", "redis+cluster://127.0.0.1:1"),
        ("redis+sentinel://:hunter2@127.0.0.1:1,127.0.0.1:2/main", "redis+sentinel://127.0.0.1:1,127.0.0.1:2/main"),
        ("unix:///nowhere/valkey.sock?password=hunter2", "unix:///nowhere/valkey.sock"),
    ],
)
def test_a_store_that_nobody_serves_is_named_at_once(
    run: Run, tmp_path: Path, words: list[str], url: str, place: str
) -> None:
    """Operator: which setting leads nowhere is said within a moment, in words, and without its password."""
    settings(tmp_path, url)
    begun_s = time.monotonic()

    ran = run(*words)

    assert time.monotonic() - begun_s < PATIENCE_S
    assert (1, "") == (ran.code, ran.out)
    assert ran.err.startswith(f"meterlib: nobody answers at {place}, which is [store] url of meterlib.toml: ")
    assert ran.err.endswith("; does a server run there?\n")
    assert 1 == ran.err.count("\n")
    assert "hunter2" not in ran.err
    assert "repeating" not in ran.err


def test_the_doctor_names_the_store_that_nobody_serves(run: Run, tmp_path: Path) -> None:
    """Operator: the doctor's first finding says where it looked."""
    settings(tmp_path, "redis://:hunter2@127.0.0.1:1/0")
    begun_s = time.monotonic()

    ran = run("doctor", "--json")

    assert time.monotonic() - begun_s < PATIENCE_S
    assert 1 == ran.code
    assert "nobody answers at redis://127.0.0.1:1/0, which is [store] url of" in ran.findings["store"]["found"]
    assert "hunter2" not in ran.out


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:p%40ss@host:6379/0?socket_timeout=1&password=p", "redis://host:6379/0"),
        ("rediss://:secret@[::1]:6379", "rediss://[::1]:6379"),
        ("unix://user:secret@/run/valkey.sock?db=1", "unix:///run/valkey.sock"),
        ("redis://host", "redis://host"),
    ],
)
def test_a_url_is_shown_without_what_must_stay_secret(url: str, shown: str) -> None:
    """Operator: a message can be passed on to anybody."""
    assert shown == shown_url(url)


# ── Not made yet ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_doctor_does_not_make_the_store_it_examines(run: Run, tmp_path: Path) -> None:
    """Operator: asking in the wrong folder leaves nothing behind there, and no server running."""
    ran = run("doctor")

    assert (2, "") == (ran.code, ran.out)
    assert "the embedded store meterlib-data does not exist yet" in ran.err
    assert [] == list(tmp_path.iterdir())
