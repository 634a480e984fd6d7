"""A worker process is frozen past its visibility timeout, another one takes over, it wakes up."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from django.conf import settings
from django.db import connection

from kanthorq_django import publish
from kanthorq_django.models import Consumer, Task, TaskState
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.ledger.subscribers import GATE
from tests.quick_run import sooner

pytestmark = pytest.mark.django_db(transaction=True)

PATIENCE = 60.0  # seconds; starting a process takes its time on a busy machine

Start = Callable[..., "WorkerProcess"]


class WorkerProcess(subprocess.Popen[bytes]):
    """``manage.py runworker`` on the test's database; ``log`` is the file that it writes to."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as written:
            super().__init__(
                # Without checks: they find the leases of tests too short.
                [sys.executable, "manage.py", "runworker", "--skip-checks", *arguments],
                cwd=settings.BASE_DIR,
                env=os.environ
                | {
                    "TESTED_DATABASE": str(connection.settings_dict["NAME"]),
                    "LOG_LEVEL": "INFO",
                },
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
            )

    def has_logged(self, text: str) -> bool:
        return text in self.log.read_text()

    def freeze(self) -> None:
        """Stop every thread of it, as a paused virtual machine would."""
        self.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send_signal(signal.SIGCONT)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start worker processes; what still runs at the end is killed."""
    processes: list[WorkerProcess] = []

    def start(*arguments: str) -> WorkerProcess:
        log = tmp_path / f"worker-{len(processes)}.log"
        processes.append(WorkerProcess(log, *arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@contextmanager
def gate_closed() -> Iterator[None]:
    """Let handlers wait at the gate for as long as the block lasts."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [GATE])
        try:
            yield
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [GATE])


def is_at_the_gate(count: int) -> bool:
    """Tell whether ``count`` handlers wait at the gate."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s"
            " AND NOT granted AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())",
            [GATE],
        )
        return bool(cursor.fetchone()[0] == count)


def freeze_at_the_gate(start: Start, consumer: str) -> tuple[WorkerProcess, UUID]:
    """Freeze a worker that handles an event, and wait until its lease is over."""
    event = publish("gate.first", stream="ledger")
    frozen = start(consumer, "--poll-interval", "0.1")
    wait_until(lambda: is_at_the_gate(1), PATIENCE)
    frozen.freeze()
    wait_until(Task.objects.stuck().exists, PATIENCE)
    return frozen, event.pk


def entries(event_id: UUID) -> int:
    return Entry.objects.filter(event_id=event_id).count()


def is_completed(event_id: UUID) -> bool:
    return Task.objects.completed().filter(event_id=event_id).exists()


def check_that_it_still_works(worker: WorkerProcess) -> None:
    """Let it handle one more event, and leave in good order."""
    event = publish("gate.second", stream="ledger")
    wait_until(lambda: is_completed(event.pk), PATIENCE)
    assert entries(event.pk) == 1
    worker.terminate()
    assert worker.wait(PATIENCE) == 0


@pytest.mark.parametrize("consumer", sooner(["gated-atomic", "gated-ack"], "gated-ack"))
def test_a_frozen_worker_commits_nothing_after_another_one_finished_its_task(
    start: Start, consumer: str
):
    with gate_closed():
        frozen, event_id = freeze_at_the_gate(start, consumer)
        successor = start(consumer, "--max-tasks", "1")
        wait_until(lambda: is_at_the_gate(2), PATIENCE)
    assert successor.wait(PATIENCE) == 0
    assert is_completed(event_id)
    assert entries(event_id) == 1

    frozen.thaw()
    wait_until(lambda: frozen.has_logged("lost its lease"), PATIENCE)

    assert entries(event_id) == 1
    task = Task.objects.get(event_id=event_id)
    assert (task.state, task.attempt_count, task.lease_epoch) == (TaskState.COMPLETED, 2, 2)
    assert len(task.attempted_errors) == 1  # the lease that ran out
    check_that_it_still_works(frozen)


@pytest.mark.parametrize("consumer", sooner(["gated-atomic", "gated-ack"], "gated-atomic"))
def test_a_frozen_worker_that_wakes_beside_its_successor_commits_nothing(
    start: Start, consumer: str
):
    with gate_closed():
        frozen, event_id = freeze_at_the_gate(start, consumer)
        successor = start(consumer, "--max-tasks", "1")
        wait_until(lambda: is_at_the_gate(2), PATIENCE)
        frozen.thaw()
    assert successor.wait(PATIENCE) == 0
    wait_until(lambda: frozen.has_logged("lost its lease"), PATIENCE)

    assert is_completed(event_id)
    assert entries(event_id) == 1
    check_that_it_still_works(frozen)


def test_a_frozen_worker_that_has_acked_already_commits_and_nobody_repeats_it(start: Start):
    with gate_closed():
        frozen, event_id = freeze_at_the_gate(start, "acked-gate")
        # Its row is locked by the ack that waits for its commit.
        assert Consumer.objects.get(name="acked-gate").claim() == []

    frozen.thaw()
    wait_until(lambda: is_completed(event_id), PATIENCE)

    assert entries(event_id) == 1
    assert Task.objects.get(event_id=event_id).attempt_count == 1
    check_that_it_still_works(frozen)


def test_a_frozen_worker_without_a_transaction_repeats_its_writes_but_ends_nothing(start: Start):
    with gate_closed():
        frozen, event_id = freeze_at_the_gate(start, "gated-plain")
        successor = start("gated-plain", "--max-tasks", "1")
        wait_until(lambda: is_at_the_gate(2), PATIENCE)
    assert successor.wait(PATIENCE) == 0

    frozen.thaw()
    wait_until(lambda: frozen.has_logged("was over before its verdict"), PATIENCE)

    assert entries(event_id) == 2  # at least once: this is what ack() inside a block prevents
    task = Task.objects.get(event_id=event_id)
    assert (task.state, task.result) == (TaskState.COMPLETED, "attempt 2")
    check_that_it_still_works(frozen)
