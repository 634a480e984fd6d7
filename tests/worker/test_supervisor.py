"""Several worker processes under one supervisor."""

import contextlib
import errno
import os
import signal
from multiprocessing import resource_tracker
from pathlib import Path
from unittest import mock

import pytest
from django.core.management import call_command

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Consumer, Event, Task, Worker
from kanthorq_django.subscribers import sync
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.process import REFUSED
from kanthorq_django.worker.supervisor import (
    HEALTHY_AFTER,
    RESTART_FIRST,
    RESTART_LONGEST,
    Supervisor,
    _Slot,
)
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.processes import PATIENCE, is_alive, runworker
from tests.quick_run import sooner

pytestmark = pytest.mark.django_db(transaction=True)

TWO = ("--processes", 2)


def test_a_killed_process_is_replaced_and_all_stop_together():
    with runworker("atomic", *TWO) as supervisor:
        first, second = supervisor.wait_until_started(2)
        assert supervisor.pid not in (first, second)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in supervisor.workers(), PATIENCE)
        survivors = supervisor.wait_until_started(2)
        assert second in survivors

        assert supervisor.terminate() == 0
        assert not any(map(is_alive, survivors))
    assert f"worker process {first} died with status -9" in supervisor.text
    assert set(Worker.objects.values_list("pid", flat=True)) == {first}  # it said no goodbye


def test_what_a_start_changes_is_told_once_for_all_processes():
    publish_many([Event(subject="entry.due") for _ in range(3)], stream="ledger")
    with runworker("atomic", *TWO, "--burst") as supervisor:
        assert supervisor.wait() == 0
    told = "Consumer atomic is new and begins with 3 events that stream 'ledger' holds already."
    assert supervisor.text.count(told) == 1


def test_processes_that_a_test_starts_work_in_its_database():
    publish("entry.due", stream="ledger")
    call_command("runworker", "atomic", burst=True, processes=2)
    assert Task.objects.completed().count() == 1


def test_processes_end_when_their_supervisor_was_killed():
    with runworker("atomic", *TWO) as supervisor:
        workers = supervisor.wait_until_started(2)
        supervisor.send(signal.SIGKILL)

        wait_until(lambda: not any(map(is_alive, workers)), PATIENCE)
    assert not Worker.objects.exists()  # in good order


@pytest.mark.parametrize("number", sooner([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_signal_to_the_whole_group_ends_it_in_good_order(number: signal.Signals, tmp_path: Path):
    gate = tmp_path / "gate"
    publish("gated.closed", {"gate": str(gate)}, stream="ledger")
    with runworker("gated", *TWO) as supervisor:
        supervisor.wait_until_started(2)
        wait_until(Entry.objects.exists, PATIENCE)
        os.killpg(supervisor.pid, number)
        wait_until(lambda: Worker.objects.count() == 1, PATIENCE)  # the other one handles still
        gate.touch()

        assert supervisor.wait() == 0
    assert "Traceback" not in supervisor.text
    assert Task.objects.completed().count() == 1


def test_ctrl_c_while_processes_start_leaves_no_traceback():
    with runworker("gated", *TWO) as supervisor:
        wait_until(lambda: _spawned(supervisor.pid), PATIENCE)
        os.killpg(supervisor.pid, signal.SIGINT)

        supervisor.wait()
        wait_until(lambda: not _children(supervisor.pid), PATIENCE)
    assert "Traceback" not in supervisor.text


def _spawned(pid: int) -> list[int]:
    """Return its worker processes: the embedded database has processes there too."""
    found = []
    for child in _children(pid):
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def _children(pid: int) -> list[int]:
    """Return the processes in the session of ``pid``, but for itself."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return [child for child in found if child != pid]


def test_a_second_signal_ends_all_at_once(tmp_path: Path):
    publish("gated.closed", {"gate": str(tmp_path / "never")}, stream="ledger")
    with runworker("gated", *TWO) as supervisor:
        workers = supervisor.wait_until_started(2)
        wait_until(Entry.objects.exists, PATIENCE)
        supervisor.send(signal.SIGTERM)
        wait_until(lambda: Worker.objects.count() == 1, PATIENCE)
        supervisor.send(signal.SIGTERM)

        assert supervisor.wait(5) == 128 + signal.SIGTERM
        # They were killed before it ended; the kernel may take a moment to carry that out.
        wait_until(lambda: not any(map(is_alive, workers)), PATIENCE)


def test_a_frozen_process_holds_up_the_end_no_longer_than_promised():
    with runworker("atomic", *TWO, "--shutdown-timeout", 0.2) as supervisor:
        frozen, _ = supervisor.wait_until_started(2)
        os.kill(frozen, signal.SIGSTOP)
        supervisor.send(signal.SIGTERM)

        assert supervisor.wait(0.2 + 15) == 0
        assert not is_alive(frozen)


def test_a_burst_ends_when_every_process_is_done():
    publish_many([Event(subject="entry.made") for _ in range(50)], stream="ledger")
    with runworker("atomic", "--burst", *TWO) as supervisor:
        assert supervisor.wait() == 0, supervisor.text
    assert Task.objects.completed().count() == Entry.objects.count() == 50


def test_a_burst_that_is_refused_fails_instead_of_starting_over():
    sync(["atomic"])
    Consumer.objects.update(cluster_id=1)
    publish("entry.made", stream="ledger")
    with runworker("atomic", "--burst", *TWO) as supervisor:
        assert supervisor.wait() == 1
    assert "manage.py kanthorq rebase" in supervisor.text
    assert "Traceback" not in supervisor.text


def test_a_process_that_has_handled_enough_is_replaced():
    publish_many([Event(subject="entry.made") for _ in range(6)], stream="ledger")
    with runworker("atomic", "--max-tasks", 2, "--concurrency", 1, *TWO) as supervisor:
        wait_until(lambda: Task.objects.completed().count() == 6, PATIENCE)
        assert supervisor.terminate() == 0
    assert "died" not in supervisor.text


@pytest.mark.parametrize(
    ("lived", "pause"), [(HEALTHY_AFTER - 1, RESTART_LONGEST), (HEALTHY_AFTER + 1, RESTART_FIRST)]
)
def test_a_process_that_dies_after_a_healthy_life_is_replaced_at_once(lived: float, pause: float):
    supervisor = Supervisor(WorkerOptions(), 1)
    slot = _Slot(process=mock.Mock(exitcode=-9, pid=1), pause=RESTART_LONGEST)
    supervisor._bury(slot, lived)
    assert slot.restart_at == lived + pause


def test_a_process_that_dies_again_and_again_is_replaced_ever_more_slowly():
    supervisor, slot = Supervisor(WorkerOptions(), 1), _Slot()
    pauses = []
    for _ in range(8):
        slot.process = mock.Mock(exitcode=-9, pid=1)
        supervisor._bury(slot, 1.0)
        pauses.append(slot.restart_at - 1.0)
    assert pauses[:3] == [RESTART_FIRST, 2 * RESTART_FIRST, 4 * RESTART_FIRST]
    assert pauses[-2:] == [RESTART_LONGEST] * 2


@pytest.mark.parametrize("burst", [False, True])
def test_a_process_that_is_refused_is_replaced_after_a_pause_but_in_a_burst(*, burst: bool):
    supervisor = Supervisor(WorkerOptions(burst=burst), 1)
    slot = _Slot(process=mock.Mock(exitcode=REFUSED, pid=1))
    supervisor._bury(slot, 1.0)
    assert slot.is_refused is slot.is_done is burst
    assert slot.restart_at == (0.0 if burst else 1.0 + RESTART_FIRST)


def test_a_system_without_room_for_a_process_is_asked_again(caplog: pytest.LogCaptureFixture):
    publish("entry.made", stream="ledger")
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with mock.patch.object(
        resource_tracker,
        "ensure_running",
        wraps=resource_tracker.ensure_running,
        side_effect=[full, mock.DEFAULT, mock.DEFAULT],
    ) as ensure_running:
        call_command("runworker", "atomic", burst=True, processes=2)

    assert ensure_running.call_count == 3
    assert caplog.text.count(f"no worker process could be started: {full}") == 1
    assert Task.objects.completed().count() == 1


def test_what_no_process_could_do_is_refused_at_once():
    with runworker("atomik", *TWO) as supervisor:
        assert supervisor.wait() == 1
    (line,) = supervisor.text.splitlines()
    assert line.endswith("No subscriber declares the consumer 'atomik'; did you mean 'atomic'?")
