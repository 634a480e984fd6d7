"""What runs out: space for tables, for the log and for words, and time for statements."""

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from project.postgres.launcher import scratch_server
from tests.faults.ground import Ground
from tests.faults.small_disk import Disk, move_log, small_disk
from tests.faults.stage import Stage
from tests.quick_run import sooner

GRACE = 2.0  # seconds beyond the shutdown timeout, instead of many


@pytest.fixture
def disk(stage: Stage) -> Iterator[Disk]:
    """The disk of the stage's database, which soon is full."""
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        Path(folder).chmod(0o755)
        with small_disk(Path(folder) / "disk", stage.server.account, size_mib=48) as disk:
            space = f"{stage.view.name}_space"
            with psycopg.connect(stage.server.dsn, autocommit=True) as session:
                session.execute(f"CREATE TABLESPACE {space} LOCATION '{disk.folder}'")
                session.execute(f"ALTER DATABASE {stage.view.name} SET TABLESPACE {space}")
                yield disk
                stage.stop()
                session.execute(f"ALTER DATABASE {stage.view.name} SET TABLESPACE pg_default")
                session.execute(f"DROP TABLESPACE {space}")


def test_a_full_disk_of_the_tables_halves_nothing_and_all_goes_on_when_it_is_freed(
    stage: Stage, disk: Disk
):
    worker = stage.worker()
    client = stage.client()
    stage.wait_until_started()
    client.do("both 10")
    disk.fill()
    with suppress(psycopg.errors.DiskFull):  # what pages have left is used up first
        stage.view.execute("CREATE TABLE filler AS SELECT generate_series(1, 1000000)")
    client.do("publish 60")
    disk.free()
    client.do("both 5")

    stage.settle()

    facts = stage.check()
    assert worker.is_running is False
    failed = [made for made in facts.publications if made.outcome == "rolled back"]
    assert len(failed) > 20, "the disk was not full"


@pytest.fixture
def log_disk(tmp_path: Path, seed: int) -> Iterator[tuple[Stage, Disk]]:
    """A server whose write-ahead log is on a small disk."""
    with scratch_server() as server:
        ground = Ground(server)
        ground.create("logged")
        server.stop()
        with small_disk(server.folder / "wal", server.account, size_mib=96) as disk:
            move_log(server, disk)
            server.start()
            with Stage(server, "logged", tmp_path, seed) as stage:
                yield stage, disk
            server.stop("immediate")


def test_a_full_disk_of_the_log_stops_the_server_and_loses_nothing(
    log_disk: tuple[Stage, Disk],
):
    stage, disk = log_disk
    worker = stage.worker()
    client = stage.client()
    stage.wait_until_started()
    client.do("both 10")
    disk.fill(leave_bytes=1024 * 1024)
    client.begin("both 30")
    with suppress(psycopg.Error), stage.view.session() as session:
        for _ in range(10):
            session.execute("CREATE TABLE filler AS SELECT generate_series(1, 300000)")
            session.execute("DROP TABLE filler")
            session.execute("SELECT pg_switch_wal()")
        pytest.fail("the log never filled its disk")
    disk.free()
    stage.server.start()
    client.wait()
    client.do("both 5")

    stage.settle()

    assert worker.is_running
    stage.check()


@pytest.mark.parametrize(
    "setting", sooner(["statement_timeout", "lock_timeout"], "statement_timeout")
)
def test_a_role_whose_statements_may_take_no_time_gets_through(stage: Stage, setting: str):
    name = stage.view.name
    stage.worker()
    stage.worker()
    client = stage.client()
    stage.wait_until_started()
    stage.view.execute(f"ALTER DATABASE {name} SET {setting} = '50ms'")
    for pid in stage.view.backends():
        stage.view.value("SELECT pg_terminate_backend(%s)", pid)
    client.do("both 30")
    client.do("tick 5")

    stage.settle()

    stage.check()


def test_a_worker_that_can_tell_nobody_anything_goes_on(stage: Stage):
    """Its output goes to a full disk, where every word that it logs fails."""
    mute = stage.worker(FAULTS_OUTPUT="/dev/full")
    client = stage.client()
    stage.wait_until_started()
    client.do("both 20")

    stage.settle()

    mute.send(signal.SIGTERM)
    assert mute.wait() in (0, 120), "120: Python itself could not flush its last words"
    stage.check()


def test_a_worker_whose_output_nobody_reads_ends_within_its_time(stage: Stage, tmp_path: Path):
    pipe = tmp_path / "output"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    grace = json.dumps({"kanthorq_django.worker.process.GRACE": GRACE})
    stuck = stage.worker("--shutdown-timeout", 1, FAULTS_OUTPUT=str(pipe), FAULTS_SET=grace)
    stage.wait_until_started()
    fill(pipe)
    client = stage.client()
    client.do("both 5")  # some of which fail, and that is logged
    began = time.monotonic()

    stuck.send(signal.SIGTERM)

    assert stuck.wait() == 1
    assert time.monotonic() - began < 1 + GRACE + 2
    os.close(reader)
    stage.worker()
    stage.settle()
    stage.check()


def fill(pipe: Path) -> None:
    """Let the pipe take no more from anybody."""
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.close(writer)
