"""Very much at one moment, and what old snapshots and open transactions cost the others."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import pytest
from django.db import connections

from kanthorq_django import publish_many
from kanthorq_django.models import Consumer, Event
from kanthorq_django.models.registration import Registration
from tests.faults.ground import View
from tests.faults.stage import Client, Stage
from tests.faults.workload import STREAM

STORM_TASKS = int(os.environ.get("FAULTS_STORM_TASKS", "100000"))
STORM_SECONDS = 900  # on two busy cores; alone it takes a tenth
BATCH_SIZE = 1_000  # tasks that one claim leases at most
WORKERS = 2
LEASED = "SELECT count(*) FROM kanthorq_django_task WHERE state = 2"
FAILED = "SELECT count(*) FROM kanthorq_django_task WHERE state = 102"
ALL_DUE = """
    UPDATE kanthorq_django_task SET schedule_at = statement_timestamp() WHERE state = 102
"""
NOT_FINAL = "SELECT count(*) FROM kanthorq_django_task WHERE finalized_at IS NULL"


class Watch:
    """Looks again and again how many tasks are leased; the most that it saw counts."""

    def __init__(self, view: View) -> None:
        self._view, self.most = view, 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.2):
            self.most = max(self.most, self._view.value(LEASED))


def seconds_of_an_event(stage: Stage, client: Client) -> float:
    """Return how long an event takes that is published while others are worked off."""
    done = "SELECT count(*) FROM kanthorq_django_task AS task JOIN kanthorq_django_consumer AS c"
    done += " ON c.id = task.consumer_id WHERE c.name = 'plain' AND task.finalized_at IS NOT NULL"
    before = stage.view.value(done)
    client.do("say order.meanwhile")
    return stage.wait_until(lambda: stage.view.value(done) > before, 60)


@pytest.mark.slow
@pytest.mark.timeout(2 * STORM_SECONDS)
def test_a_storm_of_retries_due_at_one_moment_is_worked_off_in_bounded_bites(stage: Stage):
    stage.consumers = ["stormy", "plain"]
    workers = [stage.worker("--concurrency", "8") for _ in range(WORKERS)]
    client = stage.client()
    stage.wait_until_started()
    client.do(f"flood storm.retried {STORM_TASKS}")
    stage.wait_until(lambda: stage.view.value(FAILED) == STORM_TASKS, STORM_SECONDS)
    with Watch(stage.view).running() as watch:
        stage.view.execute(ALL_DUE)
        meanwhile = seconds_of_an_event(stage, client)
        left = stage.view.value(NOT_FINAL)
        seconds = meanwhile + stage.settle(STORM_SECONDS)

    assert left > STORM_TASKS / 10, "the storm was over before anything else was tried"
    assert meanwhile < 30, "one consumer's storm kept the other one waiting"
    # What waits to be started within a second, to be written, and one pull.
    assert watch.most <= STORM_TASKS / seconds + 3 * WORKERS * BATCH_SIZE
    stage.record(f"a storm of {STORM_TASKS} retries", seconds=seconds, rate=STORM_TASKS / seconds)
    stage.record("an event of another consumer in that storm", seconds=meanwhile)
    facts = stage.check()
    assert not any(task.lost_leases for task in facts.tasks)
    assert all(worker.is_running is False for worker in workers)


CHURN_ROUNDS = int(os.environ.get("FAULTS_CHURN_ROUNDS", "6"))
CHURN_EVENTS = 3_000
DEAD = "SELECT coalesce(sum(n_dead_tup), 0) FROM pg_stat_user_tables WHERE relname LIKE 'kanthorq%'"


class Round(NamedTuple):
    """Events that were published at once and handled: tasks a second, and what one has cost."""

    rate: float
    cpu_ms: float  # of the server; unlike the rate it does not depend on who else is busy


def run_round(stage: Stage, client: Client) -> Round:
    client.do(f"flood storm.once {CHURN_EVENTS}")
    before, began = cpu_of_backends(stage.view), time.monotonic()
    stage.settle(200)
    seconds, after = time.monotonic() - began, cpu_of_backends(stage.view)
    spent = sum(after[pid] - before.get(pid, 0) for pid in after)
    return Round(CHURN_EVENTS / seconds, spent / CHURN_EVENTS)


def cpu_of_backends(view: View) -> dict[int, float]:
    return {pid: cpu_ms(pid) for pid in view.backends()}


def cpu_ms(pid: int) -> float:
    """Return how long a process of one thread has run on a processor; skips without Linux."""
    try:
        on_cpu, *_ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except FileNotFoundError:
        pytest.skip("/proc/…/schedstat tells what a backend takes, and is not there")
    return int(on_cpu) / 1e6


@contextmanager
def old_snapshot(view: View) -> Iterator[None]:
    with view.session() as reader:
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM kanthorq_django_task")
        yield
        reader.execute("ROLLBACK")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_reader_that_keeps_an_old_snapshot_hardly_slows_anybody_down(stage: Stage):
    """Vacuum can remove nothing meanwhile; the dead rows go when the reader does."""
    stage.consumers = ["stormy"]
    stage.worker("--concurrency", "8")
    client = stage.client()
    stage.wait_until_started()
    run_round(stage, client)  # the first one is slower
    before = [run_round(stage, client) for _ in range(CHURN_ROUNDS)]
    with old_snapshot(stage.view):
        during = [run_round(stage, client) for _ in range(CHURN_ROUNDS)]
        stage.view.execute("VACUUM kanthorq_django_task, kanthorq_django_consumer")
        kept = int(stage.view.value(DEAD))
    stage.view.execute("VACUUM kanthorq_django_task, kanthorq_django_consumer")

    # The later rounds have the most dead rows to wade through.
    late = during[CHURN_ROUNDS // 2 :]
    dearer = median(each.cpu_ms for each in late) / median(each.cpu_ms for each in before)
    slower = median(each.rate for each in before) / median(each.rate for each in late)
    stage.record("an old snapshot: dearer, slower", dearer=dearer, slower=slower, dead=kept)
    assert kept > CHURN_EVENTS, "vacuum was not held up"
    assert int(stage.view.value(DEAD)) < kept / 10
    assert dearer < 1.5
    stage.check()


PULLS = 400
OPEN = {
    "nothing": (),
    "a long write": ("BEGIN", "SELECT pg_current_xact_id()"),
    "an idle reader": ("BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT 1"),
    "a forgotten prepared transaction": (
        "BEGIN",
        "SELECT pg_current_xact_id()",
        "PREPARE TRANSACTION 'forgotten too'",
    ),
}


@contextmanager
def left_open(view: View, statements: Sequence[str]) -> Iterator[None]:
    with view.session() as session:
        for statement in statements:
            session.execute(statement)
        yield
        is_prepared = bool(statements) and "PREPARE" in statements[-1]
        session.execute("ROLLBACK PREPARED 'forgotten too'" if is_prepared else "ROLLBACK")


def costs_of_pulls(consumer: Consumer) -> tuple[float, float]:
    """Return the p50 and the p99 of what the server takes to read one event after the other."""
    raw = connections[consumer.using].connection
    taken = []
    for _ in range(PULLS):
        publish_many([Event(subject="order.made")], stream=STREAM, using=consumer.using)
        before = cpu_ms(raw.pgconn.backend_pid)
        assert len(consumer.pull(10)) == 1
        taken.append(cpu_ms(raw.pgconn.backend_pid) - before)
    cut = quantiles(taken, n=100)
    return cut[49], cut[98]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pulls_cost_no_more_beside_transactions_that_stay_open(stage: Stage):
    """What was written meanwhile is behind the cursor, and is not read again."""
    name = stage.view.name
    figures = {}
    consumer = Consumer.objects.using(name).register("reader", Registration(STREAM, [">"]))
    for what, statements in OPEN.items():
        with left_open(stage.view, statements):
            backlog = (Event(subject="order.before") for _ in range(10_000))
            publish_many(backlog, stream=STREAM, using=name)
            while consumer.pull(1_000):
                pass
            figures[what] = costs_of_pulls(consumer)
    for what, (p50, p99) in figures.items():
        stage.record(f"a pull beside {what}, ms of CPU", p50=p50, p99=p99)
    usual = figures.pop("nothing")
    assert all(p50 < 2 * usual[0] for p50, _ in figures.values())
    assert all(p99 < 10 for _, p99 in figures.values())
