"""A session that listens and forgets its transaction fills the queue of notifications."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from kanthorq_django.models.maintenance.health import Status, examine
from project.postgres.launcher import Server, scratch_server
from tests.faults.ground import Ground, View
from tests.faults.stage import Stage

USAGE = "SELECT pg_notification_queue_usage()"
SMALLEST = "64"  # pages of 8 KiB, instead of a million
PAYLOAD = "SELECT pg_notify('elsewhere', repeat('x', 7900) || n) FROM generate_series(1, 8) AS n"
FULL_ENOUGH = 0.3


def shrink_queue(server: Server) -> None:
    """Give the server the smallest queue; skips where its size cannot be set."""
    with psycopg.connect(server.dsn, autocommit=True) as session:
        try:
            session.execute(f"ALTER SYSTEM SET max_notify_queue_pages = {SMALLEST}")
        except psycopg.errors.UndefinedObject:
            pytest.skip("the queue of 8 GiB would have to be filled: PostgreSQL 17 can shrink it")
    server.restart("fast")


@pytest.fixture
def stage(tmp_path: Path, seed: int) -> Iterator[Stage]:
    """A server of one's own: the queue is shared by all its databases."""
    with scratch_server() as server:
        shrink_queue(server)
        ground = Ground(server)
        ground.create("noisy")
        with ground.alias("noisy"), Stage(server, "noisy", tmp_path, seed) as stage:
            yield stage


@contextmanager
def forgotten_listener(view: View) -> Iterator[None]:
    with view.session() as session:
        session.execute("LISTEN elsewhere")
        session.execute("BEGIN")
        session.execute("SELECT 1")
        yield


def fill(view: View, usage: float) -> None:
    """Notify until so much of the queue is used."""
    while view.value(USAGE) < usage:
        view.rows(PAYLOAD)


def notifications(stage: Stage) -> tuple[Status, str]:
    findings = examine(stage.view.name)
    (found,) = (finding for finding in findings if finding.check == "notifications")
    return found.status, found.detail


def test_a_listener_that_forgets_its_transaction_is_reported_before_the_queue_is_full(
    stage: Stage,
):
    assert notifications(stage)[0] is Status.OK
    with forgotten_listener(stage.view):
        fill(stage.view, FULL_ENOUGH)
        status, told = notifications(stage)

    assert status is Status.FAILED
    assert "of the notification queue used, 10% allowed" in told
    fill_is_over = stage.wait_until(lambda: stage.view.rows(PAYLOAD) and is_read(stage.view))
    assert fill_is_over < 10


def is_read(view: View) -> bool:
    return float(view.value(USAGE)) < FULL_ENOUGH


def test_a_queue_of_notifications_that_is_full_delays_events_and_loses_none(stage: Stage):
    """Committed events stay committed though nobody could be told; polling finds them."""
    stage.worker("--poll-interval", "0.5")
    client = stage.client()
    stage.wait_until_started()
    client.do("both 10")
    with forgotten_listener(stage.view):
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            fill(stage.view, 1.0)
        client.do("say order.unannounced")
        client.do("both 40")
        seconds = stage.settle()
    client.do("both 10")

    stage.settle()

    stage.record("the queue of notifications is full: everything handled", seconds=seconds)
    facts = stage.check()
    assert all(made.outcome != "in doubt" for made in facts.publications)
