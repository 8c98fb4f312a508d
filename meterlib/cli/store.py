"""The configured store, opened by commands that look at it: no call is counted, and nothing runs in the background."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from meterlib.config import DEFAULT_URL, FILE_NAME, Config
from meterlib.core.decisions import LimitState
from meterlib.core.ledger import LedgerEntry
from meterlib.errors import EmbeddedError, PolicyError, StoreError, StoreRefused, StoreUnavailable
from meterlib.store import flows
from meterlib.store.commands import Flow, ShardHead
from meterlib.store.connect import client_of, driver_for_url, shown_url
from meterlib.store.drivers import SyncDriver
from meterlib.store.embedded import parse_embedded_url
from meterlib.store.flows import Context, Partition

T = TypeVar("T")
PAGE = 1000


class Store:
    """Reads of one store. Unlike a meter it never sweeps: looking at reservations leaves them as they are."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.context = Context(config.policy, config.store.options, None, "deny")
        self._driver: Any = driver_for_url(config.store.url, config.store.options, None, "sync")

    @property
    def shards(self) -> int:
        """How many ledgers the store has, by the configuration."""
        return self.config.store.shards

    def shard_of(self, tenant: str) -> int:
        """The shard whose ledger has the entries of a tenant."""
        return self.context.shard_of(tenant)

    def head(self, shard: int) -> ShardHead:
        """A shard's own numbers."""
        return self.run(flows.read_head(shard))

    def ledger(self, shard: int, after: int = 0) -> Iterator[LedgerEntry]:
        """The entries of a shard behind number `after`, in order, as far as they go now."""
        while True:
            page = self.run(flows.read_ledger(shard, after, PAGE))
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1].n

    def start_of(self, shard: int, since_ms: int, head: ShardHead) -> int:
        """The number to read behind so as to see all that was booked from `since_ms` on, and one entry before it.

        The entry before shows that none is missing there.
        """
        before = self.first_since(shard, since_ms, head) - 1
        return max(0, before - 1) if before >= head.ledger_first else 0

    def first_since(self, shard: int, since_ms: int, head: ShardHead) -> int:
        """The number of the first entry that was booked at `since_ms` or later; behind the last one if none was.

        Entries are in order of time, so it is found in a few steps.
        """
        low, high = max(1, head.ledger_first), head.ledger_last + 1
        while low < high:
            middle = (low + high) // 2
            found = self.run(flows.read_ledger(shard, middle - 1, 1))
            if found and found[0].booked_at < since_ms:
                low = found[0].n + 1
            else:
                high = middle
        return low

    def clock_ms(self, shard: int) -> int:
        """A shard's own time, in ms since 1970 UTC.

        Raises:
            StoreCorrupt: the store is of another layout than the configuration says.
        """
        return self.run(flows.clock_ms(shard))

    def peek(self, tenant: str, attributes: Mapping[str, str]) -> tuple[LimitState, ...]:
        """How every limit that such a call touches stands now."""
        return self.run(flows.peek(self.context, tenant, attributes))

    def partitions(self, tenant: str) -> list[Partition]:
        """How every limit stands for each partition of the tenant that the store knows."""
        return self.run(flows.partitions(self.context, tenant))

    def run(self, flow: Flow[T]) -> T:
        """Run a flow of the store to its result."""
        result: T = self._driver.run(flow)
        return result

    @property
    def client(self) -> Any:
        """The redis-py client underneath; None for a store in memory."""
        return client_of(self._driver)

    def reach(self) -> None:
        """Raise StoreUnavailable at once if nobody serves the store."""
        if isinstance(self._driver, SyncDriver):
            self._driver.reach()

    def close(self) -> None:
        """Close what was opened; an embedded server that was started for this stops, if nobody else uses it."""
        self._driver.close()
        server = getattr(self._driver, "server", None)
        if server is not None:
            server.close()


@contextmanager
def opened(config: Config, file: str | None = "") -> Iterator[Store]:
    """The store of a configuration; one that is there, and of the layout that the configuration says.

    With another number of shards it would be read in part, and nobody would notice.

    Args:
        config: the settings.
        file: what the command was told by `--config`, to say which file's setting leads nowhere; "" not to say it.

    Raises:
        PolicyError: it is an embedded one that does not exist, and is not to be created by merely looking at it.
        StoreCorrupt: it is of another layout.
        StoreError: nobody serves it.
    """
    check_exists(config)
    with closing(Store(config)) as store:
        try:
            store.reach()
            store.clock_ms(0)
            yield store
        except EmbeddedError:  # which names its folder
            raise
        except StoreUnavailable as error:
            raise StoreError(f"{no_answer(error, config, file)}; does a server run there?") from error
        except StoreRefused as error:
            raise StoreError(f"{error} (at {_place(config, file)})") from error


def no_answer(error: StoreUnavailable, config: Config, file: str | None) -> str:
    """That nobody answers, with the place, the setting that leads there, and the cause."""
    return f"nobody answers at {_place(config, file)}: {error.cause or error}"


def _place(config: Config, file: str | None) -> str:
    found = None if file == "" else settings_file(file)
    setting = f"[store] url of {found}" if found else "[store] url"
    by_default = " by default" if config.store.url == DEFAULT_URL else ""
    return f"{shown_url(config.store.url)}, which is {setting}{by_default}"


def settings_file(file: str | None) -> str | None:
    """The file that the settings were read from, as `Config.find` does; None if there is none."""
    return file or (FILE_NAME if Path(FILE_NAME).exists() else None)


def check_exists(config: Config) -> None:
    """Raise PolicyError if the store is an embedded one whose folder does not exist."""
    if config.store.url.startswith("embedded://"):
        folder = Path(parse_embedded_url(config.store.url))
        if not folder.exists():
            problem = f"the embedded store {folder} does not exist yet; the first meter that uses it creates it"
            raise PolicyError("store.url", problem)
