"""One Ray actor per attempt: which node has which shard, who fetches it from storage, and what is quarantined.

The first node that asks for a shard fetches it from storage; the others wait for it and copy it from that node. A node
whose server is gone loses its claims and its copies here; when the coordinator is gone, nodes fetch by themselves.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from data.fetch import Deadline
from data.manifest import ShardInfo
from data.quarantine import Quarantine

# How long a node waits for another one's fetch before that one is asked whether it still lives.
CHECK_SECONDS = 1.0
PING_SECONDS = 5.0
STATISTICS_SECONDS = 10.0
# What a call to an actor ends in when the actor, its process or its machine is gone or does not answer in time.
GONE = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnschedulableError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,
    TimeoutError,
)


@dataclass(frozen=True)
class Source:
    """Where a node is to take a shard from: `storage`, the copy of `node`, or nowhere yet (`wait` for `node`)."""

    kind: str
    node: str = ""


class Directory:
    """Who has and who fetches what; shards by digest. Pure bookkeeping."""

    def __init__(self) -> None:
        self._holders: dict[str, list[str]] = {}
        self._claims: dict[str, str] = {}

    def join(self, node: str, digests: Sequence[str]) -> None:
        """A node's server has started and found these copies."""
        self.forget(node)
        for digest in digests:
            self._holders.setdefault(digest, []).append(node)

    def forget(self, node: str) -> None:
        """The node's server is gone."""
        for digest in [digest for digest, holders in self._holders.items() if node in holders]:
            self.lost(digest, node)
        self._claims = {digest: claimant for digest, claimant in self._claims.items() if claimant != node}

    def ask(self, digest: str, node: str) -> Source:
        """Where the node is to take the shard from; `storage` is a claim that stands until `done` or `forget`."""
        holders = self._holders.get(digest, [])
        for turn, holder in enumerate(holders):
            if holder != node:
                # The next one to ask is sent to another holder.
                holders.append(holders.pop(turn))
                return Source("copy", holder)
        claimant = self._claims.setdefault(digest, node)
        return Source("storage") if claimant == node else Source("wait", claimant)

    def done(self, digest: str, node: str, has_it: bool) -> None:
        """The node's fetch has ended."""
        if self._claims.get(digest) == node:
            del self._claims[digest]
        if has_it and node not in self._holders.setdefault(digest, []):
            self._holders[digest].append(node)

    def lost(self, digest: str, node: str) -> None:
        """The node has no good copy."""
        holders = [holder for holder in self._holders.get(digest, []) if holder != node]
        if holders:
            self._holders[digest] = holders
        else:
            self._holders.pop(digest, None)


@dataclass
class _Member:
    server: Any
    incarnation: str


class Coordinator:
    """The actor's class. Servers say in each call which incarnation they are; an unknown one is told to join.

    Calls without a result answer True: None is what a server sees of a coordinator that is gone.
    """

    def __init__(self, total_tokens: int, fraction: float, quarantined: Sequence[ShardInfo] = ()) -> None:
        """Budget of the quarantine, and what an earlier attempt quarantined."""
        self._directory = Directory()
        self._members: dict[str, _Member] = {}
        self._quarantine = Quarantine(total_tokens, fraction)
        self._quarantine.restore(quarantined)
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Event()

    async def join(
        self, node: str, incarnation: str, server: Any, digests: Sequence[str], quarantined: Sequence[ShardInfo]
    ) -> bool:
        """A node's server has started, or found that this coordinator does not know it."""
        self._members[node] = _Member(server, incarnation)
        self._directory.join(node, digests)
        self._quarantine.restore(quarantined)
        self._wake()
        return True

    async def source(self, shard: ShardInfo, node: str, incarnation: str, seconds: float) -> tuple[Source, Any]:
        """Where this node is to take a shard from, and the server to copy it from; waits at most `seconds`.

        Kind `join`: this server is not known here. Kind `wait`: another node still fetches it. Raises
        QuarantinedShard.
        """
        deadline = Deadline(seconds)
        while True:
            member = self._members.get(node)
            if member is None or member.incarnation != incarnation:
                return Source("join"), None
            if shard.path in self._quarantine:
                raise self._quarantine.error(shard.path)
            source = self._directory.ask(shard.digest, node)
            if source.kind == "copy":
                self._counts["copies"] += 1
                return source, self._members[source.node].server
            if source.kind == "storage" or deadline.left() <= 0:
                return source, None
            self._counts["waits"] += 1
            try:
                await asyncio.wait_for(self._changed.wait(), min(CHECK_SECONDS, deadline.left()))
            except TimeoutError:
                await self._check(source.node)

    async def done(self, digest: str, node: str, incarnation: str, has_it: bool) -> bool:
        """The node's fetch has ended; those who wait for it go on."""
        member = self._members.get(node)
        if member is not None and member.incarnation == incarnation:
            self._directory.done(digest, node, has_it)
            self._wake()
        return True

    async def lost(self, digest: str, node: str) -> bool:
        """The node had no good copy when it was asked for one."""
        self._directory.lost(digest, node)
        self._wake()
        return True

    async def quarantine(self, shard: ShardInfo, reason: str) -> None:
        """Quarantine a shard for all nodes; raises QuarantinedShard, or DataError past the budget."""
        error = self._quarantine.add(shard, reason)
        self._wake()
        raise error

    async def restore(self, shards: Sequence[ShardInfo]) -> bool:
        """Quarantine what the run's state names; raises DataError past the budget."""
        self._quarantine.restore(shards)
        return True

    async def quarantined(self) -> list[str]:
        """Paths of quarantined shards, for the run's state."""
        return self._quarantine.state()

    async def statistics(self) -> dict[str, int]:
        """Sums over the nodes that answer (`nodes` of them), and what was counted here."""
        answers = await asyncio.gather(
            *[_answer(member.server.statistics, STATISTICS_SECONDS) for member in self._members.values()]
        )
        total = Counter(self._counts)
        for answer in answers:
            total.update(answer or {})
        total["nodes"] = sum(answer is not None for answer in answers)
        total["quarantined"] = len(self._quarantine.state())
        return dict(total)

    async def _check(self, node: str) -> None:
        """Forget a node whose server does not answer, or has been started anew."""
        member = self._members.get(node)
        if member is None or await _answer(member.server.ping, PING_SECONDS) == member.incarnation:
            return
        if self._members.get(node) is member:
            del self._members[node]
            self._directory.forget(node)
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _answer(method: Any, seconds: float) -> Any:
    """What a server answers, or None when it is gone or too slow."""
    try:
        call = method.options(concurrency_group="control").remote()
        return await asyncio.wait_for(asyncio.wrap_future(call.future()), seconds)
    except GONE:
        return None
