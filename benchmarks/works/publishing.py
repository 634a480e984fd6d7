"""Publishing: one by one, each with a commit of its own, and many at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.arena import Arena
from benchmarks.peers.peer import Entry, Peer
from benchmarks.processes import Conversation
from benchmarks.works.work import Comparison, Scale

SLICES = 20  # turns in a round: the disk's moods then meet all contestants alike
PER_SECOND = 1_000


@dataclass(frozen=True, slots=True)
class PublishOneByOne:
    """Publications a second of one publisher, each with a commit of its own."""

    comparison: Comparison

    def measure_together(
        self, arena: Arena, parts: Sequence[tuple[Peer, Entry]], scale: Scale
    ) -> dict[str, Mapping[str, float]]:
        """Let all publish in short turns; return the figures of each by its label."""
        count = round(PER_SECOND * scale.seconds / SLICES)
        seconds: dict[str, float] = dict.fromkeys((entry.label for _, entry in parts), 0.0)
        with ExitStack() as stack:
            speakers = {
                entry.label: stack.enter_context(_publisher(arena, peer, entry, count))
                for peer, entry in parts
            }
            for _ in range(SLICES):
                for label, speaker in speakers.items():
                    seconds[label] += speaker.ask()
        return {label: {"rate": SLICES * count / took} for label, took in seconds.items()}


@contextmanager
def _publisher(arena: Arena, peer: Peer, entry: Entry, count: int) -> Iterator[Conversation]:
    with (
        arena.database(peer) as database,
        arena.converse(peer, database, "take_turns", entry.job, count) as conversation,
    ):
        yield conversation


@dataclass(frozen=True, slots=True)
class PublishMany:
    """Publications a second of one call for many."""

    comparison: Comparison

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        with arena.database(peer) as database:
            answer = arena.ask(peer, database, "enqueue", entry.job, scale.bulk)
        return {"rate": scale.bulk / answer["seconds"]}
