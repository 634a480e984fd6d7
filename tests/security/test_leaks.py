"""Bodies, metadata and passwords stay out of logs, reprs and errors; what is stored is cleansed."""

import logging
from typing import Any

import psycopg
import pytest
from django.db import IntegrityError, OperationalError, transaction

from kanthorq_django import Discard, publish, publish_many, subscribe
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.exceptions import KanthorqError, UndecodableEvent
from kanthorq_django.management.refusals import explain
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Schedule, Task
from kanthorq_django.testing import drain
from tests.admin.schedules import kept
from tests.commands.console import kanthorq
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db

SECRET = "hunter2"  # noqa: S105  # what must not appear anywhere
ESCAPES = "\x1b[2J\r\x00\u202e\ud800"


def test_reprs_hold_neither_bodies_nor_metadata():
    task = TaskFactory.create(event__body=SECRET, event__metadata={"k": SECRET}, result=SECRET)
    row = kept(body=SECRET, metadata={"k": SECRET})
    things = [task, task.event, Message(task), task.consumer, row, Schedule.objects.all()]
    for thing in (*things, Event.objects.all(), Task.objects.all()):
        assert SECRET not in repr(thing) + str(thing)


def test_the_log_of_a_worker_holds_no_body(declared: Registry, caplog: Any):
    @subscribe("ok.>", consumer="ok", stream="s")
    def handle(message):
        secret = message.event.body
        return {"seen": len(secret)}

    @subscribe("bad.>", consumer="bad", stream="s", attempt_max=1)
    def fail(message):
        secret = message.event.body  # a local, as tracebacks of some tools show
        raise ValueError(len(secret))

    @subscribe("odd.>", consumer="odd", stream="s", attempt_max=1)
    def decode(message):
        message.event.json()

    for subject in ("ok.a", "bad.a", "odd.a"):
        publish(subject, f"{{{SECRET}", metadata={"k": SECRET}, stream="s")
    with caplog.at_level(logging.DEBUG, logger="kanthorq_django"):
        assert drain("ok", "bad", "odd") == 3
    assert "failed" in caplog.text
    assert SECRET not in caplog.text
    for record in caplog.records:
        assert SECRET not in str(vars(record))
    stored = Task.objects.exclude(attempted_errors=[]).values_list("attempted_errors", flat=True)
    assert len(stored) == 2
    assert SECRET not in str(list(stored))


@pytest.mark.parametrize("count", [1, 3])
def test_what_the_database_refuses_is_told_without_the_body(count: int):
    stored = publish("a", SECRET)
    events = [Event(subject="a", body=SECRET.encode()) for _ in range(count)]
    events[-1].id = events[-1]._drawn_id = stored.pk  # as no id that is drawn can be
    with pytest.raises(IntegrityError) as caught, transaction.atomic():
        publish_many(events)
    assert str(stored.pk) in str(caught.value)
    assert SECRET not in str(caught.value)
    assert SECRET.encode().hex() not in str(caught.value)


@pytest.mark.parametrize(
    "body", [{"k": {SECRET}}, {"k": [float("nan"), SECRET]}, {"k": f"{SECRET}\x00"}]
)
def test_a_body_that_is_refused_is_not_quoted(body: Any):
    with pytest.raises(KanthorqError) as caught:
        publish("a", body)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("body", [f"{SECRET} is no JSON", b"\xff" + SECRET.encode(), "[" * 9_999])
def test_a_body_that_is_no_json_is_not_quoted(body: Any):
    with pytest.raises(UndecodableEvent) as caught:
        publish("a", body).json()
    assert SECRET not in str(caught.value)


def test_a_known_key_with_another_body_quotes_neither():
    publish("a", f"{SECRET}-1", idempotency_key="k")
    with pytest.raises(KanthorqError) as caught:
        publish("a", f"{SECRET}-2", idempotency_key="k")
    assert SECRET not in str(caught.value)


def test_a_stored_traceback_is_cut_and_has_no_control_characters(declared: Registry, settings):
    settings.KANTHORQ = {"ERROR_SIZE_MAX": 500}

    @subscribe("a", consumer="c", stream="s", attempt_max=1)
    def fail(message):
        raise ValueError(ESCAPES + "x" * 100_000)

    publish("a", stream="s")
    drain("c")
    (failure,) = Task.objects.get().attempted_errors
    assert len(failure["stack"]) == 500
    assert len(failure["error"]) <= 2_000
    assert failure["error"].isprintable()
    assert failure["stack"].replace("\n", "").replace("\t", "").isprintable()


def test_a_reason_cannot_forge_a_line_of_the_log(declared: Registry, caplog: Any):
    @subscribe("a", consumer="c", stream="s")
    def give_up(message):
        raise Discard("gone\nCRITICAL root: all is lost\x1b[2J")

    publish("a", stream="s")
    with caplog.at_level(logging.WARNING, logger="kanthorq_django"):
        drain("c")
    (record,) = [each for each in caplog.records if "discarded" in each.getMessage()]
    assert record.getMessage().isprintable()


def test_a_connection_that_fails_tells_no_password():
    with pytest.raises(psycopg.OperationalError) as refused:
        psycopg.connect(f"host=127.0.0.1 port=1 dbname=d user=u password={SECRET}")
    told = explain(OperationalError(str(refused.value)), "default")
    assert "cannot be reached" in told
    assert SECRET not in told


def test_stats_and_health_tell_of_no_body():
    TaskFactory.create(event__body=SECRET, event__metadata={"k": SECRET})
    for verb in (("stats",), ("stats", "--json"), ("health", "--json"), ("tasks", "list")):
        assert SECRET not in kanthorq(*verb).out
