"""Publishing: one by one, each with a commit of its own, and many at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.arena import Arena
from benchmarks.peers.peer import Entry, Peer
from benchmarks.works.work import Comparison, Scale

PER_SECOND = 2_000


@dataclass(frozen=True, slots=True)
class PublishOneByOne:
    """Publications a second of one publisher, each with a commit of its own."""

    comparison: Comparison

    def entries(self, peer: Peer) -> tuple[Entry, ...]:
        return peer.entries_for("publish")

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        count = round(PER_SECOND * scale.seconds)
        with arena.database(peer) as database:
            answer = arena.ask(peer, database, "publish", entry.job, count)
        return {"rate": count / answer["seconds"]}


@dataclass(frozen=True, slots=True)
class PublishMany:
    """Publications a second of one call for many."""

    comparison: Comparison

    def entries(self, peer: Peer) -> tuple[Entry, ...]:
        return peer.entries_for("many")

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        with arena.database(peer) as database:
            answer = arena.ask(peer, database, "enqueue", entry.job, scale.bulk)
        return {"rate": scale.bulk / answer["seconds"]}
