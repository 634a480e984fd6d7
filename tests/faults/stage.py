"""Where a fault test plays: a database, its workers and clients, and the verdict at the end."""

import ctypes
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import psycopg
from django.conf import settings

from project.postgres.launcher import Server
from tests.concurrency import wait_until
from tests.faults import history
from tests.faults.facts import Facts
from tests.faults.ground import View
from tests.faults.invariants import Violation, judge
from tests.faults.workload import CONTRACTS, LEASE, WORKLOAD
from tests.processes import RunningWorker, is_alive, runworker

ORDER_PATIENCE = 90.0  # seconds in which a client has to carry out an order
PATIENCE = 30.0  # seconds in which whatever is waited for has to happen
FIGURES = Path(os.environ.get("FAULTS_FIGURES", tempfile.gettempdir())) / "kanthorq-faults.jsonl"
LEASE_SECONDS = LEASE.total_seconds()
CLONE_NEWNET = 0x40000000
QUICK = ("--poll-interval", "0.1", "--concurrency", "4")


def record(fault: str, **figures: float) -> None:
    """Keep figures for docs/reliability.md, and show them."""
    line = json.dumps({"fault": fault, **{k: round(v, 2) for k, v in figures.items()}})
    sys.stdout.write(f"{line}\n")
    with FIGURES.open("a") as file:
        file.write(f"{line}\n")


class Client:
    """The process of publishers and operators; one order at a time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_for_end(self) -> int:
        return self._process.wait(PATIENCE)

    def begin(self, order: str) -> None:
        """Give an order, and return at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        """Wait until the last order is carried out."""
        assert self._process.stdout is not None
        is_there, _, _ = select.select([self._process.stdout], [], [], ORDER_PATIENCE)
        assert is_there, "the client does not come to the end of its order"
        said = self._process.stdout.readline()
        assert said == "done\n", f"the client ended with {said!r}"

    def do(self, order: str) -> None:
        self.begin(order)
        self.wait()


class Stage:
    """A database of its own in ``server``, and everybody who works with it."""

    def __init__(self, server: Server, name: str, folder: Path, seed: int) -> None:
        self.server, self.folder, self.seed = server, folder, seed
        self.view = View(server.socket_dir, name)
        self.history = folder / "history"
        self.history.mkdir()
        self.consumers = list(WORKLOAD)
        self.is_durable, self.is_undisturbed = True, False
        self.groups: list[int] = []  # every process group that was started
        self._exits = ExitStack()
        self._workers: list[RunningWorker] = []
        self._client_count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def worker(
        self,
        *arguments: object,
        url: str = "",
        point: str = "",
        sql: dict[str, list[list[str]]] | None = None,
        within: str = "",
        code: Path | None = None,
        **variables: str,
    ) -> RunningWorker:
        """Start a worker for all consumers; ``point`` is where it is to die, see hooks.py.

        ``within`` names a network namespace, ``code`` the folder of another release.
        """
        given = self._environment(url) | {"FAULTS_POINT": point, "LOG_LEVEL": "INFO"} | variables
        given["FAULTS_SQL"] = json.dumps(sql or {})
        if code is not None:
            given |= {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
        with _network(within):
            worker = self._exits.enter_context(
                runworker(*self.consumers, *QUICK, *arguments, **given)
            )
        self._workers.append(worker)
        self.groups.append(worker.pid)
        return worker

    def client(self, url: str = "", point: str = "", **variables: str) -> Client:
        """Start publishers and an operator; ``point`` is where they are to die."""
        given = self._environment(url) | {"FAULTS_POINT": point} | variables
        return self._exits.enter_context(self._client(given))

    def wait_until_started(self) -> None:
        """Wait until every worker is at work: one that finds no database at its start ends."""
        self.wait_until(self._have_all_started)

    def settle(self, seconds: float = PATIENCE) -> float:
        """Wait until all that was published is handled; return how many seconds that took.

        It may stand still for so many ``seconds``. How long all of it takes depends on how much
        there is, and on who else is busy on this machine.
        """
        if self.is_durable:  # else the rows of workers may have been lost
            self.wait_until_started()
        began = time.monotonic()
        fewest, deadline = math.inf, began + seconds
        while (left := self._unsettled()) and time.monotonic() < deadline:
            if left < fewest:
                fewest, deadline = left, time.monotonic() + seconds
            time.sleep(0.05)
        if left:
            raise AssertionError(self._told("Waited in vain."))
        return time.monotonic() - began

    def wait_until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> float:
        """Wait for ``condition``; return how many seconds that took."""
        began = time.monotonic()
        try:
            wait_until(condition, seconds)
        except AssertionError:
            raise AssertionError(self._told("Waited in vain.")) from None
        return time.monotonic() - began

    def stop(self) -> None:
        """End everybody in good order."""
        alive = [worker for worker in self._workers if worker.is_running]
        for worker in alive:
            os.killpg(worker.pid, signal.SIGCONT)
            worker.send(signal.SIGTERM)
        for worker in alive:
            assert worker.wait(PATIENCE) == 0, worker.text
        self._exits.close()

    def check(self) -> Facts:
        """Stop everybody; fail with all that is wrong, and with what is needed to repeat it."""
        self.stop()
        facts = self.facts()
        if violations := judge(facts):
            raise AssertionError(self._told("\n".join(map(str, violations[:20]))))
        return facts

    def violations(self) -> list[Violation]:
        """Stop everybody, and return what is wrong."""
        self.stop()
        return judge(self.facts())

    def facts(self) -> Facts:
        calls = history.read(self.history)
        tasks = self.view.tasks()
        return Facts(
            contracts={name: CONTRACTS[name] for name in self.view.consumers()},
            publications=list(history.publications(calls)),
            handlings=list(history.handlings(calls)),
            operations=list(history.operations(calls)),
            events=self.view.events(),
            tasks=tasks,
            effects=self.view.effects(),
            leftovers=self._leftovers(),
            is_durable=self.is_durable,
            is_undisturbed=self.is_undisturbed,
        )

    def record(self, fault: str, **figures: float) -> None:
        record(fault, **figures)

    def _environment(self, url: str) -> dict[str, str]:
        return {
            "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
            "DATABASE_URL": url or self.view.url(),
            "TESTED_DATABASE": "",
            "FAULTS_HISTORY": str(self.history),
            "DEBUG": "false",
            "SECRET_KEY": "of a test",
        }

    @contextmanager
    def _client(self, given: dict[str, str]) -> Iterator[Client]:
        code = "import django; django.setup(); from tests.faults.client import main; main({!r})"
        self._client_count += 1
        with (
            (self.folder / "clients.log").open("ab") as log,
            subprocess.Popen(
                [sys.executable, "-c", code.format(f"{self.seed} {self._client_count}")],
                cwd=settings.BASE_DIR,
                env=os.environ | given,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            ) as process,
        ):
            self.groups.append(process.pid)
            try:
                yield Client(process)
            finally:
                process.kill()
                process.wait()

    def _have_all_started(self) -> bool:
        rows = self.view.rows("SELECT pid FROM kanthorq_django_worker")
        groups = {os.getpgid(pid) for (pid,) in rows if is_alive(pid)}
        return groups >= {worker.pid for worker in self._workers if worker.is_running}

    def _unsettled(self) -> float:
        """Return how many tasks are not made or not finished; infinitely many if nobody answers."""
        with suppress(psycopg.OperationalError):
            return self.view.unsettled()
        return math.inf

    def _leftovers(self) -> list[str]:
        """Return what outlived the workers; the server is given a moment to notice their end."""
        deadline = time.monotonic() + 5
        while (found := self.view.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found + [f"process group {group}" for group in self.groups if is_alive(group)]

    def _told(self, what: str) -> str:
        said = "\n".join(f"--- worker {w.pid}:\n{w.text[-2000:]}" for w in self._workers)
        where = f"Seed: FAULTS_SEED={self.seed}, history: {self.history}"
        with suppress(psycopg.Error):
            where += "\n" + "\n".join(self.view.left() + self.view.open())
        return f"{what}\n{where}\n{said}"


@contextmanager
def _network(name: str) -> Iterator[None]:
    """Let what this thread starts live in the network namespace ``name``, if one is given."""
    if not name:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as ours, Path(f"/run/netns/{name}").open() as its:
        assert libc.setns(its.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(ours.fileno(), CLONE_NEWNET) == 0
