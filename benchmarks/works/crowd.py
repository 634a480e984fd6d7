"""Eight publishers at once, with and without somebody who listens."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

from benchmarks.arena import Arena
from benchmarks.peers.peer import Entry, Peer
from benchmarks.works.work import Comparison, Scale

PUBLISHERS = 8
LISTENERS = 4
START_SECONDS = 4.0  # until all publishers are up


@dataclass(frozen=True, slots=True)
class Crowd:
    """Commits a second of eight publishers; the job says who listens."""

    comparison: Comparison

    def measure(self, arena: Arena, peer: Peer, entry: Entry, scale: Scale) -> Mapping[str, float]:
        count = round(entry.jobs_per_second * scale.seconds / PUBLISHERS)
        start_at = time.time() + START_SECONDS
        with (
            arena.database(peer, "enqueue", "noop", 1) as database,
            _listeners(arena, database, LISTENERS if entry.job == "listeners" else 0),
            ThreadPoolExecutor(PUBLISHERS) as pool,
        ):
            asked = ("publish", "noop", count, start_at)
            futures = [
                pool.submit(arena.ask, peer, database, *asked, environment=entry.environment)
                for _ in range(PUBLISHERS)
            ]
            seconds = max(future.result()["seconds"] for future in futures)
        return {"rate": PUBLISHERS * count / seconds}


@contextmanager
def _listeners(arena: Arena, database: str, count: int) -> Iterator[None]:
    """Listen as workers do, without the work that would take the publishers' processors."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=_listen, args=(arena.cluster.url(database), stop))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _listen(url: str, stop: threading.Event) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        streams = connection.execute("SELECT id FROM kanthorq_django_stream").fetchall()
        for (stream_id,) in streams:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(f"kanthorq_{stream_id}")))
        while not stop.is_set():
            for _ in connection.notifies(timeout=0.2):
                pass
