"""Where contestants meet: each run gets a fresh copy of the same prepared database."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import brokers
from benchmarks.database import Cluster
from benchmarks.environments import ROOT, python_of
from benchmarks.exceptions import RunFailed
from benchmarks.peers.board import PATH_VARIABLE, Board
from benchmarks.peers.peer import Peer
from benchmarks.processes import Conversation, Worker, ask, wait_until

SETTLE_SECONDS = 30


@dataclass
class Arena:
    """The server, a folder for boards and logs, and the databases that runs are copies of."""

    cluster: Cluster
    folder: Path
    redis: str | None = None  # its URL, if there is one
    _templates: dict[tuple[str, ...], str] = field(default_factory=dict)
    _serial: Iterator[int] = field(default_factory=itertools.count)

    @property
    def board_path(self) -> Path:
        return self.folder / "board"

    @contextmanager
    def database(
        self, peer: Peer, *fill: object, environment: Mapping[str, str] | None = None
    ) -> Iterator[str]:
        """Yield a database with the peer's tables, in which ``fill`` was asked of its adapter.

        It is a copy of one that is made once, so all rounds start alike; later it is gone.
        """
        is_inside = peer.broker == "postgresql"  # what is queued is a part of the database
        asked = tuple(map(str, fill))
        name = self.cluster.create(
            f"run_{next(self._serial)}", self._template(peer, asked * is_inside, environment)
        )
        try:
            if not is_inside:
                self._fill(peer, name, asked)
            self.cluster.settle(name)
            yield name
        finally:
            self.cluster.drop(name)

    def ask(
        self,
        peer: Peer,
        database: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> Any:
        """Let the peer's adapter do something; return its answer. Raises RunFailed."""
        adapter = f"benchmarks.peers.{peer.package}.adapter"
        command = [str(python_of(peer)), "-m", adapter, *map(str, arguments)]
        return ask(command, self.environment(peer, database) | dict(environment or {}))

    def converse(self, peer: Peer, database: str, *arguments: object) -> Conversation:
        """Return an adapter that takes turns with others, ready when it is entered."""
        adapter = f"benchmarks.peers.{peer.package}.adapter"
        command = [str(python_of(peer)), "-m", adapter, *map(str, arguments)]
        return Conversation(command, self.environment(peer, database))

    @contextmanager
    def workers(
        self,
        peer: Peer,
        database: str,
        job: str,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[list[Worker]]:
        """Yield running workers, of ``processes`` processes together."""
        parts = [part.format(job=job, processes=processes) for part in peer.worker]
        filled = [part for part in parts if part]
        count = 1 if peer.has_processes_option else processes
        environment = self.environment(peer, database) | dict(environment or {})
        log = self.folder / f"{peer.package}.log"
        with ExitStack() as stack:
            yield [
                stack.enter_context(Worker([str(python_of(peer)), *filled], environment, log))
                for _ in range(count)
            ]

    def environment(self, peer: Peer, database: str) -> dict[str, str]:
        """Return what the peer's processes find in their environment."""
        broker = {"BENCH_BROKER": self.redis} if peer.broker == "redis" and self.redis else {}
        return {
            **broker,
            "BENCH_DSN": self.cluster.url(database),
            PATH_VARIABLE: str(self.board_path),
            "DJANGO_SETTINGS_MODULE": peer.settings,
            "PYTHONPATH": str(ROOT),
        }

    def wait_until_settled(
        self, peer: Peer, database: str, count: int, workers: list[Worker]
    ) -> None:
        """Return once the database says that all jobs are acknowledged. Raises RunFailed."""
        if not peer.settled:
            return
        with psycopg.connect(self.cluster.url(database), autocommit=True) as connection:

            def is_settled() -> bool:
                row = connection.execute(peer.settled, {"count": count}).fetchone()
                return bool(row and row[0])

            wait_until(is_settled, workers, SETTLE_SECONDS, "not all jobs are acknowledged")

    def check_effects(self, database: str, count: int) -> None:
        """Raise RunFailed unless each of ``count`` jobs left exactly one row."""
        query = "SELECT count(*), count(DISTINCT number) FROM effects_effect"
        with psycopg.connect(self.cluster.url(database)) as connection:
            found = connection.execute(query).fetchone()
        if found != (count, count):
            raise RunFailed(f"{count} jobs left (rows, distinct ones) {found}")

    def check_board(self, board: Board, count: int) -> None:
        """Raise RunFailed unless each job was handled exactly once."""
        if (board.done_count, board.doubled_count) != (count, 0):
            raise RunFailed(
                f"of {count} jobs {board.done_count} were handled, {board.doubled_count} of them "
                "more than once"
            )

    def _fill(self, peer: Peer, database: str, asked: tuple[str, ...]) -> None:
        if self.redis is not None:
            brokers.empty(self.redis)
        if asked:
            self.ask(peer, database, *asked)

    def _template(
        self, peer: Peer, asked: tuple[str, ...], environment: Mapping[str, str] | None = None
    ) -> str:
        key = (peer.package, *asked, *(environment or {}).values())
        if key not in self._templates:
            base = self._template(peer, ()) if asked else None
            name = self.cluster.create(f"template_{len(self._templates)}", base)
            if asked:
                self.ask(peer, name, *asked, environment=environment)
            else:
                self.ask(peer, name, "install")
            self._templates[key] = name
        return self._templates[key]
