"""A connection is cut for an answer that was lost, and for nothing that merely looks like it."""

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.utils import timezone

from kanthorq_django.worker.connections import probe
from tests.concurrency import begin_elsewhere
from tests.processes import PATIENCE
from tests.quick_run import sooner

pytestmark = pytest.mark.django_db(transaction=True)

SECONDS = 5.0  # for which a backend is at work
LOOKS = 4


@pytest.fixture
def role() -> Iterator[str]:
    with connection.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS kanthorq_assumed")  # of a run that was killed
        cursor.execute("CREATE ROLE kanthorq_assumed")
    yield "kanthorq_assumed"
    connection.close()
    with connection.cursor() as cursor:
        cursor.execute("DROP ROLE kanthorq_assumed")


def look_again_and_again(monkeypatch: pytest.MonkeyPatch, is_going_on: Callable[[], bool]) -> None:
    """Look at the connections of this process, without the pauses that a worker makes."""
    monkeypatch.setattr(probe, "PROBE_EVERY", 0.0)
    looks = probe.Probe("default")
    pause = threading.Event()
    for _ in range(LOOKS):
        assert is_going_on()
        looks.make_if_due()
        pause.wait(0.1)


@pytest.mark.parametrize("setting", ["SELECT 1", "SET track_activities = off", "SET ROLE {role}"])
@pytest.mark.parametrize("seconds", sooner([SECONDS, SECONDS / 250], SECONDS / 250))
def test_a_backend_at_work_is_left_alone_whatever_is_shown_of_it(
    monkeypatch: pytest.MonkeyPatch, role: str, setting: str, seconds: float
):
    """Django assumes a role by its option of that name, in all connections of a process."""
    setting = setting.format(role=role)
    begun = threading.Event()

    def work() -> None:
        with connection.cursor() as cursor:
            cursor.execute(setting)
            for _ in range(round(SECONDS / seconds)):
                begun.set()
                cursor.execute("SELECT pg_sleep(%s)", [seconds])

    working = begin_elsewhere(work)
    assert begun.wait(PATIENCE)
    with connection.cursor() as cursor:
        cursor.execute(setting)

    look_again_and_again(monkeypatch, lambda: not working.done())

    working.result(PATIENCE)


def streamed(cursor: Any) -> Iterator[Any]:
    return cursor.stream("SELECT generate_series(1, 1000)")  # type: ignore[no-any-return]


def copied(cursor: Any) -> Iterator[Any]:
    with cursor.copy("COPY (SELECT generate_series(1, 1000)) TO STDOUT") as copy:
        yield from copy


@pytest.mark.parametrize("read", [streamed, copied])
def test_who_reads_slowly_what_the_server_has_sent_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[Any], Iterator[Any]]
):
    has_read, goes_on = threading.Event(), threading.Event()

    def export() -> int:
        with transaction.atomic(), connection.cursor() as cursor:
            count = 0
            for _ in read(cursor.connection.cursor()):
                count += 1
                has_read.set()
                goes_on.wait(PATIENCE)
            return count

    exporting = begin_elsewhere(export)
    assert has_read.wait(PATIENCE)

    look_again_and_again(monkeypatch, lambda: not exporting.done())

    goes_on.set()
    assert exporting.result(PATIENCE) == 1000


def test_a_connection_is_cut_only_where_nothing_has_changed_between_two_looks(
    monkeypatch: pytest.MonkeyPatch,
):
    """Else a statement was answered, and the next one has just been sent."""
    first, second = timezone.now(), timezone.now() + timedelta(seconds=1)
    found = iter([{7: first}, {7: second}, {7: second}])
    cuts: list[object] = []
    looking = probe.Probe("default")
    monkeypatch.setattr(probe, "PROBE_EVERY", 0)
    monkeypatch.setattr(probe, "cut", cuts.append)
    monkeypatch.setattr(looking, "_due_at", 0)
    monkeypatch.setattr(looking, "_waiting", lambda: {7: "a connection"})
    monkeypatch.setattr(looking, "_look", lambda _: next(found))

    told = [looking.make_if_due() and len(cuts) for _ in range(3)]

    assert told == [0, 0, 1]
