"""The faults of a soak: each hits something that is chosen at random, and is over soon."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg

from tests.faults.hooks import POINTS
from tests.faults.stage import LEASE_SECONDS
from tests.faults.test_clock import LIBRARIES, wrong_by
from tests.faults.test_network import LOST_REPLIES
from tests.faults.test_transactions import LOCKS

if TYPE_CHECKING:
    from tests.faults.soak import Soak

Fault = Callable[["Soak"], Any]  # False: there was nothing to harm
FAULTS: dict[str, Fault] = {}
DELIBERATE = [name for name in POINTS if not name.startswith("publication")]


def missing() -> Iterator[str]:
    """Yield what this machine cannot do, and what would let it."""
    if shutil.which("pgbouncer") is None:
        yield "a pooler that crashes: apt-get install pgbouncer"
    if not LIBRARIES:
        yield "clocks that are wrong: apt-get install libfaketime"


def clocks(chance: Random) -> Mapping[str, Any]:
    """Return the variables of a process whose clock may be wrong."""
    if LIBRARIES and chance.random() < 0.2:
        return wrong_by(chance.choice(["+600s", "-600s"]))
    return {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__.replace("_", " ")] = function
    return function


@fault
def kill_a_worker(soak: "Soak") -> Any:
    return _signal(soak, signal.SIGKILL)


@fault
def stop_a_worker(soak: "Soak") -> Any:
    return _signal(soak, signal.SIGTERM)


@fault
def freeze_a_worker(soak: "Soak") -> Any:
    """Freeze it for a while that may be longer than a lease."""
    worker = soak.victim()
    if worker is None:
        return False
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGSTOP)
        time.sleep(soak.chance.uniform(0.2, 2 * LEASE_SECONDS))
        os.killpg(worker.pid, signal.SIGCONT)
    return True


@fault
def kill_at_a_point(soak: "Soak") -> Any:
    """Add a worker that is to die at one of the named points."""
    point = f"{soak.chance.choice(DELIBERATE)}:{soak.chance.randrange(1, 20)}:KILL"
    number = soak.chance.randrange(len(soak.slots))
    old = soak.slots[number]
    if old is not None and old.is_running:
        old.send(signal.SIGTERM)
    doomed = soak.stage.worker(url=soak.road(), point=point)
    soak.slots[number] = doomed
    soak.doomed.append(doomed)


@fault
def swallow_poison(soak: "Soak") -> Any:
    client = soak.stage.client()
    client.do(f"say poison.{soak.chance.choice(['exit', 'segfault', 'raise'])}")


@fault
def restart_the_server(soak: "Soak") -> Any:
    soak.stage.server.restart("fast")


@fault
def crash_the_server(soak: "Soak") -> Any:
    soak.stage.server.restart("immediate")


@fault
def kill_a_backend(soak: "Soak") -> Any:
    backends = soak.stage.view.backends()
    with suppress(ProcessLookupError):
        os.kill(soak.chance.choice(backends), signal.SIGKILL)


@fault
def end_some_connections(soak: "Soak") -> Any:
    backends = soak.stage.view.backends()
    for pid in soak.chance.sample(backends, len(backends) // 2):
        with suppress(psycopg.Error):
            soak.stage.view.value("SELECT pg_terminate_backend(%s)", pid)


@fault
def reset_connections(soak: "Soak") -> Any:
    soak.proxy.reset()


@fault
def silence_connections(soak: "Soak") -> Any:
    """Half-open: what is sent is swallowed; the server finds out by its keepalives."""
    soak.proxy.freeze()
    time.sleep(soak.chance.uniform(0.1, 2))
    soak.proxy.abandon()


@fault
def cut_the_road(soak: "Soak") -> Any:
    with soak.proxy.away():
        time.sleep(soak.chance.uniform(0.1, 3))


@fault
def partition(soak: "Soak") -> Any:
    with soak.proxy.partitioned():
        time.sleep(soak.chance.uniform(0.5, 2 * LEASE_SECONDS))


@fault
def delay_the_road(soak: "Soak") -> Any:
    latest = soak.chance.uniform(0, 0.2)
    soak.proxy.lateness = lambda: latest
    threading.Timer(3, lambda: setattr(soak.proxy, "lateness", float)).start()


@fault
def lose_replies(soak: "Soak") -> Any:
    for fragment in soak.chance.sample(list(LOST_REPLIES.values()), 3):
        lose = soak.proxy.lose_reply_to if soak.chance.random() < 0.7 else soak.proxy.lose
        lose(fragment)


@fault
def crash_the_pooler(soak: "Soak") -> Any:
    if soak.pool is None:
        return False
    soak.pool.kill()
    time.sleep(soak.chance.uniform(0, 2))
    soak.pool.start()
    return True


@fault
def lock_something(soak: "Soak") -> Any:
    with suppress(psycopg.Error), soak.stage.view.session() as session, session.transaction():
        session.execute(soak.chance.choice(sorted(LOCKS.values())))
        time.sleep(soak.chance.uniform(0.2, 1.5 * LEASE_SECONDS))


@fault
def write_for_long(soak: "Soak") -> Any:
    """Hold a transaction open in the background."""

    def hold() -> None:
        with suppress(psycopg.Error), soak.stage.view.session() as session:
            session.execute("BEGIN")
            session.execute("SELECT pg_current_xact_id()")
            time.sleep(8)
            session.execute("ROLLBACK")

    threading.Thread(target=hold, daemon=True).start()


@fault
def allow_no_time(soak: "Soak") -> Any:
    """New sessions have a tight limit for each statement, for a while."""
    name = soak.stage.view.name
    setting = soak.chance.choice(["statement_timeout", "lock_timeout"])
    soak.stage.view.execute(f"ALTER DATABASE {name} SET {setting} = '50ms'")
    end_some_connections(soak)
    time.sleep(2)
    soak.stage.view.execute(f"ALTER DATABASE {name} RESET {setting}")
    end_some_connections(soak)


@fault
def let_schedules_be_late(soak: "Soak") -> Any:
    client = soak.stage.client()
    with suppress(AssertionError):  # the server may be recovering just now
        client.do("tick 20")


@fault
def commit_late(soak: "Soak") -> Any:
    client = soak.stage.client()
    with suppress(AssertionError):
        client.do("straddle")


def _signal(soak: "Soak", number: signal.Signals) -> bool:
    worker = soak.victim()
    if worker is None:
        return False
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, number)
    return True
