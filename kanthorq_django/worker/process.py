"""The entry into a worker process, and what a spawned child has to do first.

No models are imported up here: a spawned child reads this module before Django is set up.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping

from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.stopping import (
    LAST_WORDS,
    STOP_SIGNALS,
    leave,
    ready_to_end,
    stop_on_signals,
)
from kanthorq_django.worker.tuning import rarely_collecting, switching_often

PARENT_CHECKED_EVERY = 1.0  # seconds
# Seconds beyond the shutdown timeout: whoever is to stop has ended after 15 of them. Of several
# processes each ends itself before its supervisor would kill it, and that one ends after that.
GRACE = 12.0  # for a database that does not answer
KILL_AFTER = GRACE + LAST_WORDS + 0.5
SUPERVISOR_GRACE = KILL_AFTER + 0.5
REFUSED = 78  # status of a child that would refuse again; EX_CONFIG of sysexits.h


def run_process(
    options: WorkerOptions,
    tell: Callable[[int], None] | None = None,
    *,
    is_all: bool = False,
    is_child: bool = False,
) -> None:
    """Run one worker in this process until it is done; tell how many handlers it started.

    ``is_all`` says that the process is to do nothing else, and ``is_child`` that a supervisor
    stops it. Raises as ``WorkerLoop.run()``. Does not return when handlers outlive the shutdown
    timeout: the interpreter would wait for what they started.
    """
    from kanthorq_django.worker.connections.scarcity import expect_small_pools
    from kanthorq_django.worker.connections.upkeep import expect_dead_hosts
    from kanthorq_django.worker.loop import WorkerLoop

    expect_dead_hosts()
    expect_small_pools(options.concurrency)
    loop = WorkerLoop(options)
    # A service manager may send SIGTERM to all of the group, and then the supervisor does: a
    # child that took that for a second signal would leave its handlers in the middle.
    stopping = stop_on_signals(
        loop.stop,
        patience=options.shutdown_timeout.total_seconds() + GRACE,
        numbers=(signal.SIGTERM,) if is_child else STOP_SIGNALS,
        heeds_second=not is_child,
    )
    end_within = ready_to_end() if is_all else None
    with stopping as left, rarely_collecting(), switching_often():
        count = loop.run()
        if loop.has_stragglers:
            loop.tell_stragglers()
        if loop.has_stragglers or loop.has_failed:
            leave(int(loop.has_failed))
        if tell is not None:
            tell(count)
        if end_within is not None:
            end_within(left())


def run_child(options: WorkerOptions, parent_pid: int, databases: Mapping[str, str]) -> None:
    """Run one worker in a spawned child, and stop when its supervisor is gone.

    ``databases`` are the names of the supervisor's, by alias.
    """
    # Ctrl-C reaches the whole process group; the supervisor alone decides about the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    import django
    from django.db import OperationalError, connections

    django.setup()
    for alias in databases.keys() & connections.settings.keys():  # a deployment may remove one
        connections.settings[alias]["NAME"] = databases[alias]
    _watch_parent(parent_pid)
    try:
        run_process(options, is_child=True, is_all=True)
    except KanthorqError as error:
        logger.error("%s", error)  # noqa: TRY400  # a traceback would not tell more
        sys.exit(REFUSED)
    except OperationalError as error:
        logger.error("The database cannot be reached: %s", " ".join(str(error).split()))  # noqa: TRY400  # nor here
        sys.exit(1)


def _watch_parent(parent_pid: int) -> None:
    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent_pid:
            pause.wait(PARENT_CHECKED_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="kanthorq-parent-watch", daemon=True).start()
