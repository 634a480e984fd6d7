"""Disks that are full for a while."""

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg

from tests.faults.mischief.registry import fault

if TYPE_CHECKING:
    from tests.faults.turmoil import Turmoil

SEGMENTS_MAX = 64  # more than the server keeps for use again


@fault
def fill_the_disk_of_the_tables(soak: "Turmoil") -> Any:
    """Publishers and handlers get errors, and nothing may be halved."""
    if soak.disks is None:
        return False
    soak.disks.tables.fill()
    try:
        time.sleep(soak.chance.uniform(1, 4))
    finally:
        soak.disks.tables.free()
    return True


@fault
def fill_the_disk_of_the_log(soak: "Turmoil") -> Any:
    """The server stops, and can do nothing until there is space."""
    if soak.disks is None:
        return False
    # A server (18.4) whose checkpoint is cut short forgets what was prepared, until it is started
    # once more, and marks the rows as dead that it sees meanwhile: docs/reliability.md.
    soak.remember_all()
    soak.disks.log.fill()
    try:
        with suppress(psycopg.Error), soak.stage.view.session() as session:
            for _ in range(SEGMENTS_MAX):
                session.execute("SELECT pg_logical_emit_message(true, '', '')")
                session.execute("SELECT pg_switch_wal()")
        time.sleep(soak.chance.uniform(0, 2))
    finally:
        soak.disks.log.free()
    soak.start_the_server()
    return True
