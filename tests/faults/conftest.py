import itertools
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pytest_django import DjangoDbBlocker

from project.postgres.launcher import scratch_server
from tests.concurrency import wait_until
from tests.faults.ground import Ground, View
from tests.faults.stage import Stage

_serial = itertools.count()


@pytest.fixture(autouse=True)
def unblocked(django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """These tests use no database of the project, so that none has to be flushed."""
    with django_db_blocker.unblock():
        yield


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    with scratch_server() as server:
        yield Ground(server)


@pytest.fixture
def seed() -> int:
    """What all chance of a test comes from; FAULTS_SEED repeats a run."""
    given = os.environ.get("FAULTS_SEED")
    seed = int(given) if given else random.SystemRandom().randrange(2**32)
    sys.stdout.write(f"FAULTS_SEED={seed}\n")  # pytest shows it when the test fails
    return seed


@pytest.fixture
def stage(ground: Ground, tmp_path: Path, seed: int) -> Iterator[Stage]:
    """A database in the server that all tests of this folder share."""
    with (
        ground.database() as name,
        Stage(ground.server, name, tmp_path, seed) as stage,
    ):
        yield stage


@contextmanager
def standby_of(ground: Ground, name: str) -> Iterator[Ground]:
    with ground.standby() as standby:
        written = View(ground.server.socket_dir, name).value("SELECT pg_current_wal_lsn()")
        view = View(standby.server.socket_dir, name)
        replayed = "SELECT pg_last_wal_replay_lsn() >= %s"
        wait_until(lambda: view.value(replayed, written))
        yield Ground(standby.server)


@pytest.fixture
def pair(tmp_path: Path, seed: int) -> Iterator[tuple[Stage, Ground]]:
    """A stage whose workers know two servers, and the second of them, a standby."""
    with scratch_server() as server:
        ground = Ground(server)
        ground.create("paired")
        with (
            standby_of(ground, "paired") as standby,
            Stage(server, "paired", tmp_path, seed) as stage,
        ):
            yield stage, standby
