"""Workers that die, freeze, are asked to stop, or have eaten something."""

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any

from tests.faults.hooks import POINTS
from tests.faults.mischief.registry import fault, frozen
from tests.faults.stage import LEASE_SECONDS
from tests.faults.test_clock import LIBRARIES, wrong_by

if TYPE_CHECKING:
    from tests.faults.turmoil import Turmoil

DELIBERATE = [name for name in POINTS if not name.startswith("publication")]


def clocks(chance: Random) -> Mapping[str, Any]:
    """Return the variables of a process whose clock may be wrong."""
    if LIBRARIES and chance.random() < 0.2:
        return wrong_by(chance.choice(["+600s", "-600s"]))
    return {}


@fault
def kill_a_worker(soak: "Turmoil") -> Any:
    if (worker := soak.victim()) is None:
        return False
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    return True


@fault
def stop_a_worker(soak: "Turmoil") -> Any:
    """Ask it to; the soak looks that it ends within its time."""
    if (worker := soak.victim()) is None:
        return False
    soak.ask_to_stop(worker)
    return True


@fault
def freeze_a_worker(soak: "Turmoil") -> Any:
    """Freeze it for a while that may be longer than a lease."""
    if (worker := soak.victim()) is None:
        return False
    with frozen(worker.pid, is_group=True):
        time.sleep(soak.chance.uniform(0.2, 2 * LEASE_SECONDS))
    return True


@fault
def kill_at_a_point(soak: "Turmoil") -> Any:
    """Replace a worker by one that is to die at one of the named points."""
    point = f"{soak.chance.choice(DELIBERATE)}:{soak.chance.randrange(1, 20)}:KILL"
    number = soak.chance.randrange(len(soak.slots))
    old = soak.slots[number]
    if old is not None and old.is_running:
        soak.ask_to_stop(old)
    soak.slots[number] = doomed = soak.add_worker(point=point)
    soak.doomed.append(doomed)


@fault
def swallow_poison(soak: "Turmoil") -> Any:
    kind = soak.chance.choice(["exit", "segfault", "raise", "hog"])
    soak.order(f"say poison.{kind}")


@fault
def take_longer_than_a_lease(soak: "Turmoil") -> Any:
    soak.order("say slow.on")
