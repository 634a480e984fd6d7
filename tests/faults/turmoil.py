"""Everybody at work at once, on roads and a server to which faults happen all the time."""

import functools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg

from tests.faults.cable import Cable
from tests.faults.mischief import FAULTS
from tests.faults.mischief.processes import clocks
from tests.faults.pooler import Pooler
from tests.faults.small_disk import Disk
from tests.faults.stage import Client, Stage
from tests.faults.steadiness import Steadiness
from tests.processes import RunningWorker
from tests.proxy import Proxy

SLOTS = 3  # workers that are replaced whenever they have died
PACE = 1.5  # seconds between two bursts of a client
BURST = 12  # transactions
SETTLED_WITHIN = 120.0  # seconds after the last fault
SHUTDOWN_TIMEOUT = 5.0  # seconds that handlers get
# Seconds after a worker was asked to: it ends itself after 15 more, whatever the database does.
STOPPED_WITHIN = SHUTDOWN_TIMEOUT + 15.0 + 2.0
RECOVERED_WITHIN = 10.0  # seconds in which a server that has started takes connections
HEALED_WITHIN = 60.0  # seconds in which the server has to take connections again
COUNTS = """
    SELECT (SELECT count(*) FROM kanthorq_django_event), count(*),
        count(*) FILTER (WHERE state NOT IN (101, -101, -102))
    FROM kanthorq_django_task
"""


@dataclass
class Disks:
    """Where the tables and the write-ahead log are."""

    tables: Disk
    log: Disk


@dataclass
class Turmoil:
    """A stage, the roads to its server, and who is on them."""

    stage: Stage
    proxy: Proxy  # of workers
    publishers_road: Proxy
    chance: random.Random
    pool: Pooler | None = None
    disks: Disks | None = None
    cable: Cable | None = None
    cable_end: Proxy | None = None
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    doomed: list[RunningWorker] = field(default_factory=list)
    asked: list[RunningWorker] = field(default_factory=list)
    slots: list[RunningWorker | None] = field(default_factory=lambda: [None] * SLOTS)
    forgotten: list[tuple[float, str]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    steadiness: Steadiness = field(default_factory=Steadiness)
    _clients: dict[bool, Client] = field(default_factory=dict)
    _errands: list[threading.Thread] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        """Inject faults for so long; then let everybody finish."""
        steady = self.stage.worker()
        self.stage.wait_until_started()
        self.stage.consumers.append("poison")  # which the steady one must not swallow
        self._start_feeding()
        began = reported = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            if now >= reported + 60:
                reported = now
                self._report(round((now - began) / 60))
            self._fill_slots()
            self._inject()
            self.steadiness.look(steady.pid, now - began)
            if not steady.is_running:
                self.wrong.append(f"the steady worker ended: {steady.text[-3000:]}")
                return
        self._calm_down()
        self.steadiness.look(steady.pid, time.monotonic() - began)

    def _calm_down(self) -> None:
        self.over.set()
        self.start_the_server()
        self.remember_all()
        for errand in self._errands:
            errand.join(HEALED_WITHIN * 2)
            if errand.is_alive():
                self.wrong.append(f"stuck: {errand.name}")
        # Who waits on a silent connection gives up after longer than its own end may take.
        self.proxy.cut()
        for worker in self.doomed:  # whose point may still lie ahead of them
            worker.process.kill()
            worker.wait()
        self._fill_slots(is_calm=True)
        self.counts["settled within, seconds"] = round(self.stage.settle(SETTLED_WITHIN))

    def remember_all(self) -> None:
        """Commit the prepared transactions that are forgotten now."""
        while self.forgotten:
            self.order(f"remember {self.forgotten.pop()[1]}")

    def a_road(self) -> Proxy:
        """Return a road of workers or of publishers at random."""
        roads = [self.proxy, self.publishers_road, *filter(None, [self.cable_end])]
        return self.chance.choice(roads)

    def add_worker(self, *arguments: object, point: str = "", **variables: Any) -> RunningWorker:
        """Start a worker that reaches the server on a road at random."""
        url = self.stage.view.url
        roads = [(url(), ""), (url(self.proxy.host, self.proxy.port), "")]
        if self.pool is not None:
            roads.append((url(str(self.pool.folder), self.pool.port), ""))
        if self.cable is not None and self.cable_end is not None:
            roads.append((url(self.cable_end.host, self.cable_end.port), self.cable.name))
        road, within = self.chance.choice(roads)
        limit = ("--shutdown-timeout", f"{SHUTDOWN_TIMEOUT:g}")
        return self.stage.worker(
            *limit, *arguments, url=road, within=within, point=point, **variables
        )

    def victim(self) -> RunningWorker | None:
        """Return a worker that may be harmed, if there is one."""
        alive = [
            worker
            for worker in self.slots
            if worker is not None and worker.is_running and worker not in self.asked
        ]
        return self.chance.choice(alive) if alive else None

    def ask_to_stop(self, worker: RunningWorker) -> None:
        """Send SIGTERM, and see to it that the worker ends within its time."""
        self.asked.append(worker)
        worker.process.terminate()

        def wait() -> None:
            began = time.monotonic()
            try:
                worker.wait(STOPPED_WITHIN)
            except AssertionError:
                self.wrong.append(f"stuck: a worker that was asked to stop: {worker.text[-2000:]}")
            took = round(time.monotonic() - began)
            key = "the slowest stop, seconds"
            self.counts[key] = max(self.counts[key], took)

        self.later(0, wait)

    def order(self, order: str) -> None:
        """Let a client carry out an order; it may die of it, as the server may be away."""
        is_kept = order.startswith(("forget", "remember"))  # this one knows what it has forgotten
        client = self._clients.get(is_kept)
        if client is None or not client.is_running:
            client = self._clients[is_kept] = self.stage.client()
        with suppress(AssertionError, BrokenPipeError):
            client.do(order)
            return
        self.counts[f"orders not carried out: {order.split(maxsplit=1)[0]}"] += 1

    def later(self, seconds: float, errand: Callable[[], object]) -> None:
        """Run something in the background; what is to heal runs early when all is over."""

        def run() -> None:
            self.over.wait(seconds)
            try:
                errand()
            except psycopg.Error as error:
                sys.stdout.write(f"       {errand!s}: {error}\n")
            except Exception as error:  # noqa: BLE001  # nobody else would hear of it
                self.wrong.append(f"an errand failed: {error!r}")

        thread = threading.Thread(target=run, name=str(errand), daemon=True)
        self._errands = [each for each in self._errands if each.is_alive()] + [thread]
        thread.start()

    def surely(self, *statements: str) -> None:
        """Run statements in one session, as often as it takes."""
        deadline = time.monotonic() + HEALED_WITHIN
        while time.monotonic() < deadline:
            with suppress(psycopg.Error), self.stage.view.session() as session:
                for statement in statements:
                    session.execute(statement)
                return
        self.wrong.append(f"could not mend: {statements}")

    def start_the_server(self) -> None:
        """Start it as often as it takes: it may be about to end."""
        deadline = time.monotonic() + HEALED_WITHIN
        while time.monotonic() < deadline:
            self.stage.server.start()
            if self._is_open():
                return
            # A postmaster whose recovery failed for want of space may wait for nothing (seen with
            # PostgreSQL 18); whoever operates it ends it.
            self.stage.server.stop("immediate")
        self.wrong.append("stuck: the server never came back")

    def _is_open(self) -> bool:
        deadline = time.monotonic() + RECOVERED_WITHIN
        while time.monotonic() < deadline:
            with suppress(psycopg.Error), psycopg.connect(self.stage.view.url()):
                return True
            time.sleep(0.1)
        return False

    def _fill_slots(self, *, is_calm: bool = False) -> None:
        for number, worker in enumerate(self.slots):
            if worker is None or not worker.is_running:
                variables = {} if is_calm else clocks(self.chance)
                listen = "--listen" if self.chance.random() < 0.5 else "--no-listen"
                self.slots[number] = self.add_worker(listen, **variables)

    def _inject(self) -> None:
        name = self.chance.choice(sorted(FAULTS))
        try:
            if FAULTS[name](self) is not False:
                self.counts[name] += 1
        except psycopg.Error as error:  # two faults at once: nothing was there to be harmed
            sys.stdout.write(f"       could not {name}: {' '.join(str(error).split())}\n")
        while self.forgotten and self.forgotten[0][0] < time.monotonic():
            self.order(f"remember {self.forgotten.pop(0)[1]}")
        time.sleep(self.chance.uniform(0.2, 2.5))

    def _start_feeding(self) -> None:
        road = self.publishers_road
        for url in ("", self.stage.view.url(road.host, road.port)):
            client = self.stage.client(url=url)
            self.later(0, functools.partial(self._feed, client))

    def _feed(self, client: Client) -> None:
        while not self.over.wait(PACE):
            client.do(f"both {BURST}")

    def _report(self, minute: int) -> None:
        injected = sum(count for name, count in self.counts.items() if name in FAULTS)
        told = "the database is away"
        with suppress(psycopg.Error):
            ((events, tasks, unsettled),) = self.stage.view.rows(COUNTS)
            told = f"{events:,} events, {tasks:,} tasks, {unsettled:,} of them unfinished"
        memory = self.steadiness.told
        sys.stdout.write(f"minute {minute}: {injected} faults, {told}; {memory}\n")
        sys.stdout.flush()
