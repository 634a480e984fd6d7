"""Processes that die, freeze or are asked to stop, at every point where it could matter."""

import os
import signal
import time

import pytest

from tests.faults.facts import DISCARDED
from tests.faults.stage import LEASE_SECONDS, PATIENCE, Stage
from tests.processes import RunningWorker
from tests.quick_run import sooner

HEALED_WITHIN = LEASE_SECONDS + 5.0  # seconds after which a dead worker's tasks run elsewhere
FAMILIES = {
    "pull": ("pull asked", "pull committed"),
    "claim": ("claim asked", "claim written", "turn given"),
    "handler": ("business written", "ack inside", "handler committed"),
    "verdict": ("ack asked", "ack written", "nack asked", "nack written"),
    "upkeep": ("renewal asked", "renewal written", "occurrences published"),
}


def feed_until(stage: Stage, is_over) -> None:
    """Publish work of all kinds until everybody has met the point that was set for them."""
    client = stage.client()
    deadline = time.monotonic() + PATIENCE
    while not is_over():
        assert time.monotonic() < deadline, "a point was never reached"
        client.do("say slow.on")
        client.do("tick 3")
        client.do("both 8")


@pytest.mark.parametrize("family", sooner(FAMILIES, "pull", "handler"))
def test_workers_killed_at_a_point_lose_and_double_nothing(stage: Stage, family: str):
    stage.consumers += ["ticks", "slow"]
    doomed = [stage.worker(point=f"{point}:1:KILL") for point in FAMILIES[family]]

    feed_until(stage, lambda: not any(worker.is_running for worker in doomed))

    assert {worker.wait() for worker in doomed} == {-signal.SIGKILL}
    stage.worker()
    stage.settle()
    stage.check()


def holders(stage: Stage) -> int:
    return int(stage.view.value("SELECT count(*) FROM kanthorq_django_task WHERE state = 2"))


def test_tasks_of_a_killed_worker_run_elsewhere_soon_after_their_lease(stage: Stage):
    stage.consumers = ["slow"]
    killed = stage.worker("--concurrency", "8", FAULTS_SLOW_SECONDS="600")
    client = stage.client()
    for _ in range(8):
        client.do("say slow.on")
    stage.wait_until(lambda: holders(stage) == 8)
    stage.worker("--concurrency", "8")
    stage.wait_until(lambda: len(workers(stage)) == 2)

    os.killpg(killed.pid, signal.SIGKILL)
    again = "SELECT count(*) FROM kanthorq_django_task WHERE lease_epoch = 2"
    seconds = stage.wait_until(lambda: stage.view.value(again) == 8)

    assert seconds < HEALED_WITHIN
    stage.record("a worker is killed: its tasks run elsewhere", seconds=seconds)
    stage.settle()
    stage.check()


def workers(stage: Stage) -> list[int]:
    return [pid for (pid,) in stage.view.rows("SELECT pid FROM kanthorq_django_worker")]


FREEZING = (
    "pull committed",
    "claim written",
    "business written",
    "ack inside",
    "handler committed",
)


@pytest.mark.slow
def test_workers_frozen_for_three_leases_commit_nothing_that_is_not_theirs(stage: Stage):
    frozen = [stage.worker(point=f"{point}:2:STOP") for point in FREEZING]
    feed_until(stage, lambda: all(is_stopped(worker) for worker in frozen))

    stage.worker()
    time.sleep(3 * LEASE_SECONDS)  # what is on trial is time that passes
    client = stage.client()
    client.do("both 20")
    for worker in frozen:
        os.killpg(worker.pid, signal.SIGCONT)
    stage.settle()

    stage.check()


def test_a_worker_frozen_with_what_it_pulled_does_not_keep_the_events_from_others(stage: Stage):
    stage.consumers = ["plain"]
    frozen = stage.worker(point="pull committed:1:STOP")
    client = stage.client()
    client.do("publish 5")
    stage.wait_until(lambda: is_stopped(frozen))
    stage.worker()

    seconds = stage.settle()

    assert seconds < 10
    stage.record("a worker freezes with what it pulled: another one goes on", seconds=seconds)
    stage.check()


def test_a_worker_frozen_inside_a_schedules_turn_does_not_keep_it_from_others(stage: Stage):
    stage.consumers = ["ticks"]
    frozen = stage.worker(point="occurrences published:1:STOP")
    client = stage.client()
    client.do("tick 20")
    stage.wait_until(lambda: is_stopped(frozen))
    stage.worker()

    seconds = stage.settle()

    assert seconds < 15
    stage.record("a worker freezes inside a schedule's turn: another one takes it", seconds=seconds)
    stage.check()


def is_stopped(worker: RunningWorker) -> bool:
    with open(f"/proc/{worker.pid}/stat") as stat:  # noqa: PTH123  # a pseudo-file
        return stat.read().rsplit(")", 1)[1].split()[0] == "T"


def test_a_worker_that_is_asked_to_stop_drains_within_its_time(stage: Stage):
    asked = stage.worker("--shutdown-timeout", "5")
    client = stage.client()
    client.do("both 5")
    client.begin("both 60")
    stage.wait_until(lambda: holders(stage))
    began = time.monotonic()

    asked.send(signal.SIGTERM)

    assert asked.wait() == 0, asked.text
    stage.record("SIGTERM under load: drained", seconds=time.monotonic() - began)
    assert time.monotonic() - began < 5 + 10
    assert workers(stage) == []
    client.wait()
    stage.worker()
    stage.settle()
    facts = stage.check()
    assert not any(task.lost_leases for task in facts.tasks), "something was not handed back"


@pytest.mark.slow
def test_a_storm_of_signals_ends_a_worker_at_once_and_loses_nothing(stage: Stage):
    stage.consumers += ["slow"]
    storm = stage.worker()
    client = stage.client()
    client.do("say slow.on")
    client.do("both 20")
    stage.wait_until(lambda: holders(stage))
    began = time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        if storm.is_running:
            storm.send(number)

    assert storm.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert time.monotonic() - began < 2
    stage.worker()
    stage.settle()
    stage.check()


@pytest.mark.slow
def test_supervised_processes_that_are_killed_again_and_again_lose_nothing(stage: Stage):
    supervisor = stage.worker("--processes", "2")
    client = stage.client()
    for _ in range(3):
        stage.wait_until(lambda: len(alive(stage)) == 2)
        client.begin("both 15")
        os.kill(alive(stage)[0], signal.SIGKILL)
        client.wait()

    stage.settle()

    assert supervisor.is_running
    stage.check()


def alive(stage: Stage) -> list[int]:
    return [pid for pid in workers(stage) if os.path.exists(f"/proc/{pid}")]  # noqa: PTH110  # as above


@pytest.mark.parametrize("point", ["publication written", "publication committed"])
def test_a_publisher_killed_around_its_commit_leaves_all_or_nothing(stage: Stage, point: str):
    doomed = stage.client(point=f"{point}:5:KILL")
    doomed.begin("publish 40")

    assert doomed.wait_for_end() == -signal.SIGKILL
    stage.worker()
    stage.settle()
    stage.check()


@pytest.mark.parametrize(
    "poisons",
    sooner([("exit", "segfault"), ("raise", "memory", "hog")], ("exit", "segfault")),
)
def test_poison_is_discarded_and_harms_nothing_else(stage: Stage, poisons: tuple[str, ...]):
    stage.worker("--processes", "2")
    stage.consumers = ["poison"]
    stage.worker("--processes", "2", "--concurrency", "2")
    client = stage.client()
    for poison in poisons:
        client.do(f"say poison.{poison}")
    client.do("both 10")

    stage.settle(2 * PATIENCE)

    tasks = [task for task in stage.view.tasks() if task.consumer == "poison"]
    assert len(tasks) == len(poisons)
    expected = {DISCARDED} if "hog" not in poisons else {DISCARDED, 101}
    assert {task.state for task in tasks} <= expected
    stage.check()


@pytest.mark.parametrize("poison", ["pool", "thread"])
@pytest.mark.parametrize("processes", sooner([1, 2], 2))
def test_what_a_handler_leaves_running_keeps_no_process_that_is_done(
    stage: Stage, poison: str, processes: int
):
    stage.consumers = ["poison"]
    options = ("--max-tasks", "1", "--shutdown-timeout", "0.1", "--processes", str(processes))
    worker = stage.worker(*options)
    client = stage.client()
    for _ in range(processes):
        client.do(f"say poison.{poison}")
    worker.wait_for("Threads that handlers left behind do not end")
    if processes == 1:
        assert worker.wait() == 0
    else:
        client.do(f"say poison.{poison}")  # for those that come after them
    stage.settle()
    stage.check()
