"""Every fault that this machine can do, at random and on top of each other, for as long as asked.

    make soak MINUTES=30 SEED=7

Workers are killed, frozen and replaced, the server crashes, roads to it are cut; one worker is
only ever hit by what hits its connections, and tells whether memory stays flat. At the end all
of it has to be handled exactly once, or the seed is printed with what was not.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()

from project.postgres.cluster import PORT
from project.postgres.launcher import scratch_server
from tests.faults.ground import Ground
from tests.faults.invariants import judge
from tests.faults.mischief import FAULTS, clocks, missing
from tests.faults.pooler import Pooler, pooler
from tests.faults.stage import PATIENCE, Client, Stage
from tests.processes import RunningWorker
from tests.proxy import Proxy

SLOTS = 3  # workers that are replaced whenever they have died
CLIENTS = 2
PACE = 1.5  # seconds between two bursts of a client
BURST = 12  # transactions
SETTLED_WITHIN = 120.0  # seconds after the last fault
GROWTH_BYTES_MAX = 24 * 2**20  # of the worker that is never killed, from its first quarter on


@dataclass
class Soak:
    """A stage, the roads to its server, and who is on them."""

    stage: Stage
    proxy: Proxy
    pool: Pooler | None
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    doomed: list[RunningWorker] = field(default_factory=list)
    slots: list[RunningWorker | None] = field(default_factory=lambda: [None] * SLOTS)
    sizes: list[int] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, seconds: float) -> None:
        """Inject faults for so long; then let everybody finish."""
        steady = self.stage.worker()
        self.stage.wait_until_started()
        self.stage.consumers.append("poison")  # which the steady one must not swallow
        clients = [self.stage.client() for _ in range(CLIENTS)]
        feeders = [threading.Thread(target=self._feed, args=[client]) for client in clients]
        for feeder in feeders:
            feeder.start()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                self._fill_slots()
                self._inject()
                self.sizes.append(resident_bytes(steady.pid))
                assert steady.is_running, steady.text[-3000:]
        finally:
            self.over.set()
            for feeder in feeders:
                feeder.join()
        for worker in self.doomed:  # whose point may still lie ahead of them
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        self._fill_slots(is_calm=True)
        self.counts["settled within, seconds"] = round(self.stage.settle(SETTLED_WITHIN))
        self.sizes.append(resident_bytes(steady.pid))

    def road(self) -> str:
        """Return a way to the server at random."""
        roads = [
            self.stage.view.url(),
            self.stage.view.url(self.proxy.host, self.proxy.port),
        ]
        if self.pool is not None:
            roads.append(self.stage.view.url(str(self.pool.folder), self.pool.port))
        return self.chance.choice(roads)

    def victim(self) -> RunningWorker | None:
        """Return a worker that may be harmed, if there is one."""
        alive = [worker for worker in self.slots if worker is not None and worker.is_running]
        return self.chance.choice(alive) if alive else None

    def _fill_slots(self, *, is_calm: bool = False) -> None:
        for number, worker in enumerate(self.slots):
            if worker is None or not worker.is_running:
                variables = {} if is_calm else clocks(self.chance)
                self.slots[number] = self.stage.worker(
                    "--listen" if self.chance.random() < 0.5 else "--no-listen",
                    url=self.road(),
                    **variables,
                )

    def _inject(self) -> None:
        name = self.chance.choice(sorted(FAULTS))
        if FAULTS[name](self) is not False:
            self.counts[name] += 1
        time.sleep(self.chance.uniform(0.2, 2.5))

    def _feed(self, client: Client) -> None:
        while not self.over.wait(PACE):
            client.do(f"both {BURST}")

    def judge(self) -> list[str]:
        """Return what is wrong at the end of it all."""
        stage = self.stage
        stage.stop()
        if self.pool is not None:
            self.pool.kill()
        facts = stage.facts()
        sys.stdout.write(
            f"{len(facts.publications)} publications, {len(facts.events)} events, "
            f"{len(facts.tasks)} tasks, {len(facts.handlings)} calls of handlers\n"
        )
        grown_bytes = self.sizes[-1] - max(self.sizes[: max(1, len(self.sizes) // 4)])
        sys.stdout.write(f"memory of the steady worker grew by {grown_bytes // 1024} KiB\n")
        wrong = [f"{found.invariant}: {found.what}" for found in judge(facts)]
        if grown_bytes > GROWTH_BYTES_MAX:
            wrong.append(f"the memory of a worker grew by {grown_bytes} bytes")
        return wrong


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args()
    sys.stdout.write(f"SEED={given.seed} MINUTES={given.minutes:g}\n")
    for what in missing():
        sys.stdout.write(f"left out: {what}\n")
    wrong = soak(given.minutes * 60, given.seed)
    for what in wrong[:40]:
        sys.stdout.write(f"WRONG {what}\n")
    verdict = "FAILED" if wrong else "passed: lost 0, doubled 0, nothing stuck, nothing left"
    sys.stdout.write(f"{verdict}; SEED={given.seed}\n")
    return 1 if wrong else 0


def soak(seconds: float, seed: int) -> list[str]:
    with ExitStack() as later:
        folder = Path(tempfile.mkdtemp(prefix="soak-"))
        folder.chmod(0o755)
        ground = Ground(later.enter_context(scratch_server()))
        ground.create("soak")
        socket_dir = ground.server.socket_dir
        proxy = later.enter_context(Proxy((str(socket_dir), PORT), "127.0.0.1"))
        stage = later.enter_context(Stage(ground.server, "soak", folder, seed))
        stage.consumers += ["ticks", "slow"]
        pool = None
        if not any("pgbouncer" in what for what in missing()):
            pool = later.enter_context(pooler(socket_dir, folder / "pool", size=10))
        chance = random.Random(seed)  # noqa: S311  # repeatable on purpose
        running = Soak(stage, proxy, pool, chance)
        return attempt(running, seconds)


def attempt(running: Soak, seconds: float) -> list[str]:
    """Run a soak; return what is wrong, an exception too."""
    began: Callable[[], float] = time.monotonic
    start = began()
    try:
        running.run(seconds)
        wrong = running.judge()
    except AssertionError as error:
        wrong = [str(error)]
    for name, count in sorted(running.counts.items()):
        sys.stdout.write(f"{count:6d} {name}\n")
    sys.stdout.write(f"{began() - start:.0f} s in all, patience {PATIENCE:.0f} s\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
