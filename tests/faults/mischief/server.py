"""The server restarts, crashes, freezes, refuses, or loses backends."""

import os
import signal
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import psycopg

from tests.faults.mischief.registry import fault, frozen
from tests.faults.stage import LEASE_SECONDS

if TYPE_CHECKING:
    from tests.faults.turmoil import Turmoil

CONNECTIONS_MAX = 200  # more than the server allows
SETTINGS = {
    "statement_timeout": ["50ms"],
    "lock_timeout": ["50ms"],
    "default_transaction_isolation": ["serializable", "repeatable read"],
}


@fault
def restart_the_server(soak: "Turmoil") -> Any:
    soak.stage.server.restart("fast")


@fault
def crash_the_server(soak: "Turmoil") -> Any:
    soak.stage.server.restart("immediate")


@fault
def kill_a_backend(soak: "Turmoil") -> Any:
    if not (backends := soak.stage.view.backends()):  # as after a crash that nobody has noticed
        return False
    with suppress(ProcessLookupError):
        os.kill(soak.chance.choice(backends), signal.SIGKILL)
    return True


@fault
def freeze_a_backend(soak: "Turmoil") -> Any:
    """With all that it has locked."""
    if not (backends := soak.stage.view.backends()):
        return False
    with frozen(soak.chance.choice(backends)):
        time.sleep(soak.chance.uniform(0.2, 2 * LEASE_SECONDS))
    return True


@fault
def freeze_the_postmaster(soak: "Turmoil") -> Any:
    """Nobody gets in, and those who are in stay."""
    words = (soak.stage.server.data / "postmaster.pid").read_text().split()
    with frozen(int(words[0])):
        time.sleep(soak.chance.uniform(0.2, 2 * LEASE_SECONDS))


@fault
def end_some_connections(soak: "Turmoil") -> Any:
    backends = soak.stage.view.backends()
    for pid in soak.chance.sample(backends, len(backends) // 2):
        with suppress(psycopg.Error):
            soak.stage.view.value("SELECT pg_terminate_backend(%s)", pid)


@fault
def take_all_connections(soak: "Turmoil") -> Any:
    """Take what is left of them, and let nobody else have any for a while."""
    with ExitStack() as later:
        with suppress(psycopg.OperationalError):  # the last one was refused
            for _ in range(CONNECTIONS_MAX):
                later.enter_context(psycopg.connect(soak.stage.view.url()))
        time.sleep(soak.chance.uniform(0.5, 3))


@fault
def set_a_default(soak: "Turmoil") -> Any:
    """New sessions have a tight limit for each statement or another isolation, for a while."""
    name = soak.stage.view.name
    setting = soak.chance.choice(sorted(SETTINGS))
    value = soak.chance.choice(SETTINGS[setting])
    soak.stage.view.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
    try:
        end_some_connections(soak)
        time.sleep(2)
    finally:
        # The session that mends it has the tight limit as well.
        soak.surely("SET statement_timeout = 0", f"ALTER DATABASE {name} RESET {setting}")
    end_some_connections(soak)
