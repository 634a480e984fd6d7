"""Connections that are ended, refused, or shared behind a pooler."""

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.facts import DISCARDED
from tests.faults.pooler import Pooler, pooler
from tests.faults.stage import Stage
from tests.quick_run import sooner

# How their last statements tell the connections of a worker apart. The puller is not ended while
# it pulls, for that may cost leases: its trips end with a COMMIT and a semicolon, Django's without.
PARTS = {
    "puller": "One cheap look",
    "listener": r"pg_notify\(",
    "renewer": "Extend the leases in flight",
    "handlers": "COMMIT$",
}


def end(stage: Stage, pattern: str = "") -> int:
    """End the backends that were last asked what ``pattern`` matches; return how many."""
    return len(
        [
            stage.view.value("SELECT pg_terminate_backend(%s)", pid)
            for pid in stage.view.backends(pattern)
        ]
    )


def test_connections_that_are_ended_again_and_again_lose_and_double_nothing(stage: Stage):
    workers = [stage.worker(), stage.worker()]
    client = stage.client()
    stage.wait_until_started()
    client.do("both 5")
    client.begin("both 90")
    ended = 0
    for _ in range(5):
        time.sleep(0.2)  # the moments are what is drawn
        ended += end(stage)
    client.wait()
    client.do("both 5")

    stage.settle()

    assert ended > 20
    assert all(worker.is_running for worker in workers)
    stage.check()


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_worker_whose_connection_is_ended_heals_alone(stage: Stage, part: str):
    stage.consumers += ["slow"]
    stage.worker()
    client = stage.client()
    stage.wait_until_started()
    client.do("both 5")
    client.do("say slow.on")
    stage.wait_until(lambda: end(stage, PARTS[part]))
    client.do("both 5")

    stage.settle()

    facts = stage.check()
    assert not any(task.lost_leases for task in facts.tasks)


def test_a_listener_whose_connection_is_ended_hears_again(stage: Stage):
    stage.consumers = ["plain"]
    stage.worker("--poll-interval", "60")
    client = stage.client()
    stage.wait_until_started()
    client.do("say order.first")
    stage.settle()
    stage.wait_until(lambda: end(stage, PARTS["listener"]))
    stage.wait_until(lambda: stage.view.backends(r"pg_notify\("))
    client.do("say order.second")

    seconds = stage.settle()

    assert seconds < 5
    stage.record("the listener's connection is ended: it hears again", seconds=seconds)
    stage.check()


@pytest.mark.parametrize("limit", sooner([3, 6], 3))
def test_a_role_without_connections_left_only_slows_a_worker_down(stage: Stage, limit: int):
    role = f"{stage.view.name}_few"
    stage.view.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT {limit}")
    stage.view.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    stage.view.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
    try:
        stage.worker("--concurrency", "8", url=stage.view.url(user=role))
        stage.client().do("both 10")
        stage.settle()
        facts = stage.check()
    finally:
        stage.view.execute(f"DROP OWNED BY {role}")
        stage.view.execute(f"DROP ROLE {role}")
    assert DISCARDED not in {task.state for task in facts.tasks}


@pytest.mark.parametrize("size", sooner([1, 2, 6, 12], 2))
def test_a_pool_with_few_connections_only_slows_a_worker_down(stage: Stage, size: int):
    """Leases are shorter than the pool has its threads wait."""
    stage.worker("--concurrency", "8", FAULTS_POOL_SIZE=str(size))
    client = stage.client()
    stage.wait_until_started()
    client.do("both 10")
    stage.settle()
    facts = stage.check()
    assert DISCARDED not in {task.state for task in facts.tasks}


@pytest.fixture
def pool(stage: Stage) -> Iterator[Pooler]:
    with tempfile.TemporaryDirectory(prefix="pool-") as folder:
        Path(folder).chmod(0o755)  # for the account that runs it
        with pooler(stage.server.socket_dir, Path(folder) / "socket") as running:
            yield running


@pytest.mark.slow
def test_behind_a_pooler_in_transaction_mode_everything_works_by_polling(
    stage: Stage, pool: Pooler
):
    url = stage.view.url(str(pool.folder), pool.port)
    stage.worker(url=url)  # deaf, as it listens through the pooler
    stage.worker("--no-listen", url=url)
    client = stage.client(url=url)
    stage.wait_until_started()
    client.do("both 40")
    client.do("tick 5")

    stage.settle()

    stage.stop()
    pool.kill()  # its own connections are not left-overs
    stage.check()


DEAF, HEALED = "notifications do not arrive", "listener works again"
CALL_OFTEN = json.dumps(
    {
        "kanthorq_django.worker.listener.CALL_EVERY": 0.3,
        "kanthorq_django.worker.listener.ANSWER_WITHIN": 1.0,
    }
)


@pytest.mark.parametrize("run", sooner(range(3), 0))
def test_a_listener_behind_a_pooler_in_transaction_mode_says_that_it_is_deaf(
    stage: Stage, pool: Pooler, run: int
):
    """For sure: with one worker at rest its own statements all meet the session that listens."""
    stage.consumers = ["plain"]
    url = stage.view.url(str(pool.folder), pool.port)
    worker = stage.worker("--listen", "--poll-interval", "1", url=url, FAULTS_SET=CALL_OFTEN)
    stage.wait_until_started()

    worker.wait_for(DEAF)

    stage.client().do("say order.unheard")
    stage.settle()
    assert HEALED not in worker.text
    stage.stop()
    pool.kill()
    stage.check()


def test_a_listener_behind_a_pooler_in_session_mode_hears(stage: Stage):
    stage.consumers = ["plain"]
    with tempfile.TemporaryDirectory(prefix="pool-") as folder:
        Path(folder).chmod(0o755)
        socket = Path(folder) / "socket"
        with pooler(stage.server.socket_dir, socket, size=20, mode="session") as pool:
            url = stage.view.url(str(pool.folder), pool.port)
            patient = ("--listen", "--poll-interval", "60")
            worker = stage.worker(*patient, url=url, FAULTS_SET=CALL_OFTEN)
            stage.wait_until_started()
            client = stage.client()
            client.do("say order.first")
            stage.settle()
            threading.Event().wait(3)  # more than three calls, each of which may be found unheard
            client.do("say order.second")
            assert stage.settle() < 5
            assert DEAF not in worker.text
            stage.stop()
    stage.check()


def test_a_pooler_that_pauses_restarts_and_crashes_loses_and_doubles_nothing(
    stage: Stage, pool: Pooler
):
    url = stage.view.url(str(pool.folder), pool.port)
    workers = [stage.worker("--no-listen", url=url), stage.worker("--no-listen", url=url)]
    client = stage.client(url=url)
    stage.wait_until_started()
    client.do("both 5")
    client.begin("both 60")
    pool.order("PAUSE")
    pool.order("RESUME")
    pool.stop(is_patient=True)
    pool.start()
    pool.stop(is_patient=False)
    pool.start()
    pool.kill()
    pool.start()
    began = time.monotonic()
    client.wait()
    client.do("publish 4")

    stage.settle()

    stage.record("the pooler crashes: everything handled", seconds=time.monotonic() - began)
    assert all(worker.is_running for worker in workers)
    stage.stop()
    pool.kill()
    stage.check()
