"""Several servers at once: a cluster whose slots move and whose nodes die, and a primary that sentinels watch."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.crc import key_slot

from tests.support.servers import Server, start_server, wait_until

SLOTS = 16_384
PATIENCE_SECONDS = 30.0
NODE_TIMEOUT_MS = 1000


def ask(server: Server, *words: str | int) -> Any:
    """A command's bare answer, by a connection of its own."""
    with contextlib.closing(server.client(socket_timeout=5)) as client:
        return client.execute_command(*words, NEVER_DECODE=True)  # type: ignore[no-untyped-call]


class _Servers:
    """Servers that end together."""

    def __init__(self) -> None:
        self._end = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.close()

    def _start(self, folder: Path, kind: str, config: dict[str, str], *, sentinel: bool = False) -> Server:
        return self._end.enter_context(start_server(folder, kind, config=config, sentinel=sentinel))


class Cluster(_Servers):
    """Nodes that share the slots evenly, each with a replica if wanted.

    Attributes:
        nodes: the primaries at first.
        replicas: one for each, in the same order; or none.
    """

    def __init__(self, folder: Path, kind: str, primaries: int = 3, *, replicas: bool = False) -> None:
        super().__init__()
        self._folder, self._kind = folder, kind
        try:
            self.nodes = [self._node(f"node-{at}") for at in range(primaries)]
            self.replicas = [self._node(f"replica-{at}") for at in range(primaries if replicas else 0)]
            self._meet()
            for node, replica in zip(self.nodes, self.replicas, strict=False):
                self._replicate(node, replica)
        except BaseException:
            self._end.close()
            raise

    def _node(self, name: str) -> Server:
        config = {
            "cluster-enabled": "yes",
            "cluster-port": str(_free_port()),
            "cluster-node-timeout": str(NODE_TIMEOUT_MS),
            "cluster-require-full-coverage": "no",
            "appendonly": "no",
            "repl-diskless-sync-delay": "0",
        }
        return self._start(self._folder / name, self._kind, config)

    def _meet(self) -> None:
        share = -(-SLOTS // len(self.nodes))
        for at, node in enumerate(self.nodes):
            ask(node, "CLUSTER", "ADDSLOTSRANGE", at * share, min(SLOTS, (at + 1) * share) - 1)
            ask(node, "CLUSTER", "SET-CONFIG-EPOCH", at + 1)
        everybody = [*self.nodes, *self.replicas]
        for node in everybody[1:]:
            ask(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, int(node._settings["cluster-port"]))
        wait_until(
            lambda: all(self._agreed(node, len(everybody)) for node in everybody), "the nodes to meet", PATIENCE_SECONDS
        )

    def _agreed(self, node: Server, count: int) -> bool:
        facts = ask(node, "CLUSTER", "INFO")
        known = f"cluster_known_nodes:{count}\r".encode() in facts
        return known and b"cluster_state:ok\r" in facts and f"cluster_slots_ok:{SLOTS}\r".encode() in facts

    def _replicate(self, node: Server, replica: Server) -> None:
        ask(replica, "CLUSTER", "REPLICATE", self.id_of(node))
        wait_until(lambda: _follows(replica), "replication")
        wait_until(lambda: b"slave" in ask(self.nodes[0], "CLUSTER", "NODES"), "the others to hear of it")

    @property
    def url(self) -> str:
        """What a meter connects to: any node leads to all others."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def id_of(self, node: Server) -> str:
        """The id that a node has among the others."""
        return str(ask(node, "CLUSTER", "MYID").decode())

    def owner_of(self, slot: int) -> Server:
        """Which node serves a slot now, by its own word."""
        return next(node for node in self.nodes if slot in self.slots_of(node))

    def slots_of(self, node: Server) -> set[int]:
        """The slots that a node says it serves."""
        (line,) = [line for line in ask(node, "CLUSTER", "NODES").decode().splitlines() if "myself" in line]
        ranges = [word.split("-") for word in line.split()[8:] if not word.startswith("[")]
        return {slot for ends in ranges for slot in range(int(ends[0]), int(ends[-1]) + 1)}

    def begin_move(self, slot: int, target: Server) -> Server:
        """A slot is about to move: its keys stay where they are, and who asks for absent ones is sent on."""
        source = self.owner_of(slot)
        ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))
        return source

    def move_keys(self, slot: int, source: Server, target: Server, count: int = 1) -> int:
        """Move so many keys of a slot on its way; returns how many there were."""
        keys = ask(source, "CLUSTER", "GETKEYSINSLOT", slot, count)
        for key in keys:
            ask(source, "MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        return len(keys)

    def end_move(self, slot: int, source: Server, target: Server) -> None:
        """The slot is the target's from now on."""
        for node in (target, source, *self.nodes):
            ask(node, "CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def take_over(self, at: int) -> None:
        """Return when the replica of a node that died serves in its place."""
        replica = self.replicas[at]
        wait_until(lambda: _role(replica) == b"master", "the promotion", PATIENCE_SECONDS)
        self.nodes[at] = replica


class Sentinels(_Servers):
    """A primary and its replica, watched by sentinels under the name `main`."""

    service = "main"

    def __init__(self, folder: Path, kind: str, count: int = 3) -> None:
        super().__init__()
        try:
            common = {"repl-diskless-sync-delay": "0", "appendonly": "no"}
            self.primary = self._start(folder / "primary", kind, common)
            follows = {"replicaof": f"127.0.0.1 {self.primary.port}"}
            self.replica = self._start(folder / "replica", kind, common | follows)
            wait_until(lambda: _follows(self.replica), "replication")
            self.watchers = [self._watcher(folder / f"sentinel-{at}", kind, count // 2 + 1) for at in range(count)]
            wait_until(lambda: all(self._knows_all(watcher) for watcher in self.watchers), "the sentinels to meet")
        except BaseException:
            self._end.close()
            raise

    def _watcher(self, folder: Path, kind: str, quorum: int) -> Server:
        config = {
            "sentinel monitor": f"{self.service} 127.0.0.1 {self.primary.port} {quorum}",
            "sentinel down-after-milliseconds": f"{self.service} {NODE_TIMEOUT_MS}",
            "sentinel failover-timeout": f"{self.service} 4000",
        }
        return self._start(folder, kind, config, sentinel=True)

    def _knows_all(self, watcher: Server) -> bool:
        facts = ask(watcher, "INFO", "sentinel")["master0"]
        return (int(facts["slaves"]), int(facts["sentinels"])) == (1, len(self.watchers))

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where the sentinels are."""
        return [("127.0.0.1", watcher.port) for watcher in self.watchers]

    @property
    def url(self) -> str:
        """What a meter connects to."""
        return f"redis+sentinel://{','.join(f'{host}:{port}' for host, port in self.addresses)}/{self.service}"

    def failover(self) -> None:
        """The replica becomes the primary; the old one, which is well, learns only some ten seconds later."""
        wait_until(self._told_to_fail_over, "a failover to begin", PATIENCE_SECONDS)
        self._promoted()

    def _told_to_fail_over(self) -> bool:
        try:
            ask(self.watchers[0], "SENTINEL", "FAILOVER", self.service)
        except redis.ResponseError as error:
            if "NOGOODSLAVE" in str(error) or "INPROG" in str(error):
                return False
            raise
        return True

    def lose_primary(self) -> None:
        """The primary dies; returns when the replica has taken its place."""
        self.primary.kill()
        self._promoted()

    def _promoted(self) -> None:
        wait_until(lambda: _role(self.replica) == b"master", "the promotion", PATIENCE_SECONDS)
        wait_until(lambda: self._named() == {str(self.replica.port).encode()}, "its announcement", PATIENCE_SECONDS)
        self.primary, self.replica = self.replica, self.primary

    def _named(self) -> set[bytes]:
        addresses = [ask(watcher, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service) for watcher in self.watchers]
        return {bytes(address[1]) for address in addresses}


def _follows(replica: Server) -> bool:
    return bool(ask(replica, "INFO", "replication").get("master_link_status") == "up")


def _role(server: Server) -> bytes:
    try:
        return bytes(ask(server, "ROLE")[0])
    except redis.ConnectionError:  # whose role changes hangs up on everybody
        return b""


def slot_of_shard(prefix: str, shard: int) -> int:
    """The slot that all keys of a shard are in."""
    return int(key_slot(f"{prefix}:{{{shard}}}:state".encode()))


def _free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])
