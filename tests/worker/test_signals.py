"""How a worker process ends when it is asked to, by whom, and how often."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.conf import settings

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Event, Task, TaskState, Worker
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.processes import PATIENCE, RunningWorker, environment, runworker
from tests.quick_run import sooner

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that handlers wait for; ``touch()`` lets them go on."""
    return tmp_path / "gate"


@contextmanager
def at_the_gate(gate: Path, *arguments: object) -> Iterator[RunningWorker]:
    """Run a worker until its only handler waits at ``gate``."""
    publish("gated.closed", {"gate": str(gate)}, stream="ledger")
    with runworker("gated", "--concurrency", 1, *arguments) as worker:
        wait_until(lambda: Entry.objects.exists() or not worker.is_running, PATIENCE)
        yield worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_running_handler_finish(gate: Path, number: signal.Signals):
    with at_the_gate(gate) as worker:
        assert Worker.objects.get().pid == worker.pid
        worker.send(number)
        gate.touch()

        assert worker.wait() == 0
    assert Task.objects.get().result == worker.pid
    assert not Worker.objects.exists()


def test_a_signal_gives_back_at_once_what_was_not_started(gate: Path):
    gates = [""] * 30 + [str(gate)] + [""] * 5
    publish_many(
        [Event(subject="gated.some", body={"gate": name}) for name in gates], stream="ledger"
    )
    with runworker("gated", "--concurrency", 1) as worker:
        # The pace of the first lets the worker lease the last before it can start them.
        wait_until(lambda: Task.objects.completed().count() == 30, PATIENCE)
        wait_until(lambda: Task.objects.running().count() == 6, PATIENCE)
        worker.send(signal.SIGTERM)
        wait_until(lambda: Task.objects.available().count() == 5, PATIENCE)
        assert worker.is_running
        gate.touch()

        assert worker.wait() == 0
    assert Task.objects.completed().count() == 31
    for task in Task.objects.available():
        assert (task.attempt_count, task.lease_epoch, task.attempted_errors) == (0, 1, [])


def test_a_handler_that_outlives_the_shutdown_timeout_does_not_hold_up_the_end(gate: Path):
    with at_the_gate(gate, "--shutdown-timeout", 0.2) as worker:
        assert worker.terminate() == 0
    assert Task.objects.get().state == TaskState.RUNNING  # until its lease runs out
    assert not Worker.objects.exists()


def test_a_thread_that_hangs_does_not_hold_up_the_end():
    """The interpreter would wait for the thread in which coroutines use the ORM."""
    publish("hung.up", stream="ledger")
    with runworker("hung", "--shutdown-timeout", 0.2) as worker:
        wait_until(Entry.objects.exists, PATIENCE)

        worker.send(signal.SIGTERM)
        assert worker.wait(15) == 0
    assert not Worker.objects.exists()


def test_a_process_that_cannot_stop_in_good_order_leaves_all_the_same():
    script = """
        import time
        from kanthorq_django.worker.stopping import stop_on_signals
        with stop_on_signals(lambda: print("asked", flush=True), patience=0.2):
            print("ready", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=settings.BASE_DIR,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.stdout.readline() == b"asked\n"
        assert process.wait(PATIENCE) == 1


def test_a_log_that_nobody_reads_does_not_keep_a_process_that_cannot_stop():
    with asked_to_stop(within="fill(sys.stderr); time.sleep(60)") as process:
        assert process.wait(PATIENCE) == 1


def test_a_log_that_a_thread_is_stuck_in_does_not_keep_the_interpreter():
    stuck = """
        handler = logging.StreamHandler(sys.stderr)
        fill(sys.stderr)
        record = logging.makeLogRecord({})
        threading.Thread(target=handler.handle, args=[record], daemon=True).start()
        while handler.lock.acquire(blocking=False):
            handler.lock.release()
    """
    with asked_to_stop(after=stuck) as process:
        assert process.wait(PATIENCE) == -signal.SIGALRM


@contextmanager
def asked_to_stop(within: str = "", after: str = "") -> "Iterator[subprocess.Popen[bytes]]":
    """Run a process with something to do when SIGTERM has come: ``within`` its time, and after."""
    script = """
        import contextlib, logging, os, sys, threading, time
        from kanthorq_django.worker.stopping import stop_on_signals

        def fill(stream):
            os.set_blocking(stream.fileno(), False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(stream.fileno(), bytes(4096))
            os.set_blocking(stream.fileno(), True)

        asked = threading.Event()
        with stop_on_signals(asked.set, patience=0.2):
            print("ready", flush=True)
            asked.wait()
            exec(sys.argv[1])
        exec(sys.argv[2])
    """
    parts = map(textwrap.dedent, (script, within, after))
    process = subprocess.Popen(
        [sys.executable, "-c", *parts],
        cwd=settings.BASE_DIR,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_signal_ends_the_process_at_once(gate: Path):
    with at_the_gate(gate) as worker:
        worker.send(signal.SIGTERM)
        wait_until(lambda: _is_handed_over(worker), PATIENCE)
        worker.send(signal.SIGTERM)

        assert worker.wait(5) == 128 + signal.SIGTERM
    assert Task.objects.get().state == TaskState.RUNNING


def _is_handed_over(worker: RunningWorker) -> bool:
    """Tell whether no signal waits to be delivered to the process."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    pending = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd")]
    return int(pending[0], 16) == 0


def test_a_signal_wakes_a_worker_from_a_long_rest():
    with runworker("gated", "--poll-interval", 3600, "--no-listen") as worker:
        worker.wait_until_started()
        publish("gated.open", {"gate": ""}, stream="ledger")

        assert worker.terminate() == 0


@pytest.mark.parametrize("run", sooner(range(5), 1))
def test_a_signal_in_the_middle_of_work_loses_nothing(run: int):
    publish_many([Event(subject="entry.made") for _ in range(300)], stream="ledger")
    with runworker("atomic") as worker:
        wait_until(lambda: Entry.objects.count() > 50 * run, PATIENCE)
        assert worker.terminate() == 0
    assert not Task.objects.running().exists()
    with runworker("atomic", "--burst") as worker:
        assert worker.wait() == 0, worker.text
    assert Task.objects.completed().count() == Entry.objects.count() == 300
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}


def test_a_poison_message_that_kills_its_worker_is_discarded():
    publish("poison.first", stream="ledger")
    with runworker("poison", "--poll-interval", 0.1) as worker:
        assert worker.wait() == 99
    assert Task.objects.get().state == TaskState.RUNNING
    with runworker("poison", "--poll-interval", 0.1) as worker:
        assert worker.wait() == 99
    with runworker("poison", "--poll-interval", 0.1) as worker:
        wait_until(lambda: Task.objects.discarded().exists(), PATIENCE)
        assert worker.terminate() == 0
    task = Task.objects.get()
    assert task.attempt_count == 2
    assert ["lease ran out" in error["error"] for error in task.attempted_errors] == [True, True]


def test_a_worker_row_tells_who_is_at_work():
    with runworker("gated", "atomic", "--concurrency", 3) as worker:
        worker.wait_until_started()
        row = Worker.objects.alive().get()
    assert (row.host, row.pid, row.concurrency) == (os.uname().nodename, worker.pid, 3)
    assert row.consumers == ["gated", "atomic"]
    assert row.started_at <= row.seen_at
