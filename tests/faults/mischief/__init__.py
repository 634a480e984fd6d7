"""The faults of a soak: each hits something that is chosen at random, and is over soon."""

import shutil
from collections.abc import Iterator

from tests.faults import cable, small_disk
from tests.faults.mischief import disks, processes, roads, server, transactions
from tests.faults.mischief.registry import FAULTS
from tests.faults.test_clock import LIBRARIES

__all__ = ["FAULTS", "disks", "missing", "processes", "roads", "server", "transactions"]


def missing() -> Iterator[str]:
    """Yield what this machine cannot do, and what would let it."""
    if shutil.which("pgbouncer") is None:
        yield "a pooler that crashes, restarts and pauses: apt-get install pgbouncer"
    if not LIBRARIES:
        yield "clocks that are wrong: apt-get install libfaketime"
    if not small_disk.is_possible():
        yield f"full disks: {small_disk.NEEDS}"
    if not cable.is_possible():
        yield f"cables that are pulled: {cable.NEEDS}"
    elif not cable.can_be_spoilt():
        yield (
            "a cable that loses packets: this kernel has no netem (or apt-get install iproute2);"
            " the proxies' delays and stalls are injected all the same"
        )
