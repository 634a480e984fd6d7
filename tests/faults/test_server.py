"""The server restarts, crashes, loses a backend, or is replaced by its standby."""

import json
import os
import signal
import time
from contextlib import ExitStack
from typing import Any

import pytest
from django.db import connections

from kanthorq_django import publish
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Worker
from kanthorq_django.models.registration import Registration
from project.postgres.cluster import PORT
from tests.faults.ground import Ground, View
from tests.faults.mischief.registry import frozen
from tests.faults.stage import LEASE_SECONDS, Client, Stage
from tests.quick_run import sooner

PICKED_UP_WITHIN = 10.0  # seconds after a restart in which workers go on by themselves

# By consumer: an event whose COMMIT got no answer is said again. A task that was handed back by
# a worker without a connection, and then cancelled, has been taken up by its cleanup alone.
STARTED = """
    SELECT count(DISTINCT task.consumer_id) FROM kanthorq_django_task AS task
    JOIN kanthorq_django_event AS event ON event.id = task.event_id
    WHERE event.subject = 'order.after'
        AND (task.attempt_count + task.cancel_attempt_count > 0 OR task.state IN (101, -101, -102))
"""


def seconds_to_pick_up(stage: Stage, client: Client) -> float:
    """Publish an event, and return how long it takes until all of its tasks are under way."""
    client.do("say order.after")
    return stage.wait_until(lambda: stage.view.value(STARTED) == len(stage.consumers))


@pytest.mark.parametrize("mode", sooner(["fast", "immediate"], "immediate"))
def test_workers_go_on_by_themselves_after_the_server_was_restarted(stage: Stage, mode: Any):
    workers = [stage.worker(), stage.worker()]
    client, other = stage.client(), stage.client()
    stage.wait_until_started()
    client.do("both 10")
    client.begin("both 40")
    stage.server.restart(mode)
    seconds = seconds_to_pick_up(stage, other)
    client.wait()

    stage.settle()

    assert seconds < PICKED_UP_WITHIN
    stage.record(f"the server is restarted ({mode}): workers go on", seconds=seconds)
    assert all(worker.is_running for worker in workers)
    stage.check()


@pytest.mark.parametrize("commit", sooner(["on", "off"], "on"))
def test_a_server_that_crashes_again_and_again_loses_and_doubles_nothing(stage: Stage, commit: str):
    stage.is_durable = commit == "on"
    stage.view.execute(f"ALTER DATABASE {stage.view.name} SET synchronous_commit = {commit}")
    stage.worker()
    stage.worker()
    client = stage.client()
    stage.wait_until_started()
    for _ in range(3):
        client.begin("both 20")
        stage.server.restart("immediate")
        client.wait()

    stage.settle()
    stage.check()


@pytest.mark.slow
def test_a_backend_that_is_killed_takes_all_others_along_and_loses_nothing(stage: Stage):
    stage.worker()
    client, other = stage.client(), stage.client()
    stage.wait_until_started()
    client.do("both 5")
    client.begin("both 40")
    os.kill(stage.view.backends()[0], signal.SIGKILL)
    seconds = seconds_to_pick_up(stage, other)
    client.wait()

    stage.settle()

    assert seconds < PICKED_UP_WITHIN
    stage.record("a backend is killed, so the server recovers: workers go on", seconds=seconds)
    stage.check()


def postmaster(stage: Stage) -> int:
    return int((stage.server.data / "postmaster.pid").read_text().split()[0])


@pytest.mark.parametrize(
    "what", sooner(["a backend", "every backend", "the postmaster"], "a backend")
)
def test_a_process_of_the_server_that_freezes_for_longer_than_a_lease_loses_nothing(
    stage: Stage, what: str
):
    workers = [stage.worker(), stage.worker()]
    client = stage.client()
    stage.wait_until_started()
    client.do("both 5")
    client.begin("both 40")
    stage.wait_until(lambda: len(stage.view.tasks()) > 40)
    pids = [postmaster(stage)] if what == "the postmaster" else stage.view.backends()
    with frozen(*(pids[:1] if what == "a backend" else pids)):
        time.sleep(1.5 * LEASE_SECONDS)  # what is on trial is time that passes
    client.wait()

    stage.settle()

    assert all(worker.is_running for worker in workers)
    stage.check()


def within(name: str, seconds: float) -> str:
    """Return what has a worker take ``seconds`` for a part of its end, such as process.GRACE."""
    return json.dumps({f"kanthorq_django.worker.{name}": seconds})


@pytest.mark.parametrize("grace", sooner([3.0, 15.0], 3.0))
@pytest.mark.parametrize(
    "what", sooner(["tasks are locked", "every backend is frozen"], "every backend is frozen")
)
def test_a_worker_stops_within_its_time_whatever_the_database_does(
    stage: Stage, what: str, grace: float
):
    stage.consumers += ["slow"]
    worker = stage.worker("--shutdown-timeout", "1", FAULTS_SET=within("process.GRACE", grace))
    client = stage.client()
    stage.wait_until_started()
    client.do("say slow.on")
    client.do("publish 10")
    stage.wait_until(lambda: stage.view.value("SELECT count(*) FROM kanthorq_django_task"))
    with ExitStack() as trouble:
        if what == "tasks are locked":
            session = trouble.enter_context(stage.view.session())
            trouble.enter_context(session.transaction())
            session.execute("LOCK TABLE kanthorq_django_task IN ACCESS EXCLUSIVE MODE")
        else:
            trouble.enter_context(frozen(*stage.view.backends()))
        began = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait() in (0, 1), worker.text  # 1: not in good order
        seconds = time.monotonic() - began
    assert seconds < 1 + grace + 1
    stage.record(f"SIGTERM while {what}: stopped", seconds=seconds)
    stage.worker()
    stage.settle()
    stage.check()


@pytest.mark.slow
@pytest.mark.parametrize("flush", [1.0, 10.0])
def test_a_worker_stops_within_its_time_while_the_server_is_away(stage: Stage, flush: float):
    stage.consumers += ["slow"]
    worker = stage.worker("--shutdown-timeout", "1", FAULTS_SET=within("loop.FLUSH_SECONDS", flush))
    client = stage.client()
    stage.wait_until_started()
    client.do("say slow.on")
    client.do("publish 5")
    stage.wait_until(lambda: stage.view.value("SELECT count(*) FROM kanthorq_django_task"))
    stage.server.stop("immediate")
    try:
        began = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0, worker.text
        seconds = time.monotonic() - began
    finally:
        stage.server.start()
    assert seconds < 1 + 15
    stage.record("SIGTERM while there is no server: stopped", seconds=seconds)
    stage.worker()
    stage.settle()
    stage.check()


def test_after_a_failover_workers_go_on_at_the_promoted_standby(pair: tuple[Stage, Ground]):
    stage, standby = pair
    stage.is_durable = False  # the standby may lack the last moments
    hosts = f"{stage.server.socket_dir},{standby.server.socket_dir}"
    both = stage.view.url(hosts, f"{PORT},{PORT}", target_session_attrs="read-write")
    stage.worker(url=both)
    stage.worker(url=both)
    client = stage.client(url=both)
    stage.wait_until_started()
    client.do("both 10")
    client.begin("both 40")
    began = time.monotonic()
    stage.server.stop("immediate")
    stage.view = View(standby.server.socket_dir, stage.view.name)
    stage.view.value("SELECT pg_promote()")
    client.wait()
    client.do("publish 2")

    stage.settle()

    stage.record("a failover: everything handled", seconds=time.monotonic() - began)
    stage.check()


def test_a_worker_at_a_standby_says_so_in_one_sentence(pair: tuple[Stage, Ground]):
    stage, standby = pair
    worker = stage.worker(url=View(standby.server.socket_dir, stage.view.name).url())

    assert worker.wait() == 1
    assert "is read-only, as a standby is; use the primary." in worker.text
    assert "Traceback" not in worker.text


def test_a_worker_whose_row_was_lost_with_its_commit_signs_in_again(ground: Ground):
    with ground.database() as name:
        workers = Worker.objects.using(name)
        worker = workers.create(host="shop-1", pid=7, concurrency=1)
        workers.all().delete()

        worker.see()

        assert [row.pid for row in workers.alive()] == [7]


def test_a_lease_that_was_lost_with_its_commit_cannot_end_another_task(ground: Ground):
    """What a crash without synchronous_commit, or a failover, leaves of the last moments."""
    with ground.database() as name:
        consumers = Consumer.objects.using(name)
        first, second = (consumers.register(who, Registration("s", [">"])) for who in "ab")
        publish("order.made", stream="s", using=name)
        (held,) = first.pull()  # by a worker that goes on when the server is back
        with connections[name].cursor() as cursor:
            cursor.execute("TRUNCATE kanthorq_django_task RESTART IDENTITY")
            cursor.execute("UPDATE kanthorq_django_consumer SET \"cursor\" = '1:1:'")
        second.pull()

        with pytest.raises(LeaseLost):
            Message(held).ack()
