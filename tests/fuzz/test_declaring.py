"""Subscribers, schedules, settings: refused where they are declared, or good for what follows."""

import contextlib
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.db.models.functions import Now
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st

from kanthorq_django import Fixed, Never, publish, schedule, subscribe
from kanthorq_django.checks import check_pool, check_settings
from kanthorq_django.conf import Settings, get_settings, problems
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.exceptions import ConfigurationError, InvalidEvent, KanthorqError
from kanthorq_django.models import Consumer, OperatorAction, Schedule, TaskState
from kanthorq_django.subscribers import sync
from tests.factories import TaskFactory
from tests.fuzz.adversarial import (
    anything,
    durations,
    examples,
    moments,
    mostly,
    names,
    numbers,
    subjects,
    texts,
)
from tests.fuzz.doors import knocked
from tests.fuzz.oracle import assert_sentence, refusals

filters = subjects | st.lists(st.sampled_from("a*>.")).map("".join)
options = st.fixed_dictionaries(
    {},
    optional={
        "stream": names | anything,
        "excludes": st.lists(filters | anything, max_size=3) | anything,
        "attempt_max": numbers | anything,
        "visibility_timeout": durations | anything,
        "timeout": durations | anything,
        "retry": st.sampled_from((None, Fixed(), Never(), Fixed)) | anything,
        "atomic": anything,
        "deliver": st.sampled_from(("all", "new")) | moments | anything,
        "parked": st.booleans() | anything,
        "serialize": st.sampled_from((True, "strict")) | anything,
        "batch": numbers | anything,
        "grouped": st.booleans() | anything,
    },
)


@pytest.mark.django_db
@examples(100)
@given(includes=st.lists(mostly("order.>", filters | anything), max_size=3), given=options)
def test_a_declared_subscriber_can_be_registered(
    declared: Registry, includes: list[Any], given: dict[str, Any]
):
    with knocked(ConfigurationError):
        # Few at a time, or hardly any declaration would be right.
        chosen = dict(list(given.items())[:2])
        subscribe(*includes, consumer="fuzzed", **chosen)(lambda message: None)
        (consumer,) = sync(["fuzzed"])
        stored = Consumer.objects.get(pk=consumer.pk)
        assert stored.subject_includes == list(includes)
        assert stored.subject_excludes == list(chosen.get("excludes", ()))
        assert stored.timeout == chosen.get("timeout")
        assert stored.parked == chosen.get("parked", False)
        stored.delete()


definitions = st.fixed_dictionaries(
    {
        "name": mostly("report", names | anything),
        "rrule": st.sampled_from(("FREQ=DAILY", "FREQ=WEEKLY;BYDAY=MO;COUNT=3")) | texts | anything,
        "dtstart": mostly(datetime(2026, 1, 5, 8, tzinfo=UTC), moments | anything),
        "subject": mostly("report.due", subjects | anything),
        "timezone": mostly("Europe/Berlin", names | anything),
        "exdates": mostly((), st.lists(moments | anything, max_size=3) | anything),
        "body": mostly(b"", anything),
        "metadata": mostly(None, anything),
        "stream": mostly("reports", names | anything),
        "resource_key": mostly("", names | anything),
        "catchup": mostly("last", names | anything),
    }
)


@pytest.mark.django_db
@examples(100)
@given(given=definitions)
def test_a_schedule_is_kept_whole_shown_and_published_or_refused(given: dict[str, Any]):
    with knocked(KanthorqError):
        kept = schedule(**given)
        stored = Schedule.objects.get(pk=kept.pk)
        for column in ("subject", "metadata", "exdates", "dtstart", "timezone", "rrule"):
            assert getattr(stored, column) == getattr(kept, column), column
        shown = StringIO()
        call_command("kanthorq", "schedules", "show", stored.name, stdout=shown)
        assert stored.subject in shown.getvalue()
        Schedule.objects.filter(pk=stored.pk).update(next_at=Now() - timedelta(seconds=1))
        Schedule.objects.publish_due()
        assert Schedule.objects.get(pk=stored.pk).cancelled_at is None
        stored.delete()


KEYS = [field.name for field in fields(Settings)]
values: st.SearchStrategy[Any] = numbers | durations | anything


@pytest.mark.django_db
@examples(100)
@given(declared_as=st.dictionaries(st.sampled_from(KEYS) | texts | st.integers(), values))
def test_settings_are_refused_by_name_or_good_for_work(
    declared_as: dict[Any, Any], declared: Registry
):
    with override_settings(KANTHORQ=declared_as):
        told = list(problems(declared_as))
        assert [message.id for message in check_settings()] == ["kanthorq_django.E005"] * len(told)
        assert list(check_pool()) is not None
        with refusals(ConfigurationError) as refused:
            get_settings()
        assert bool(refused) == bool(told)
        for problem, hint in told:
            assert_sentence(ValueError(problem))
            assert_sentence(ValueError(hint))
        if not told:
            with knocked(InvalidEvent, ConfigurationError):
                use_settings()


def use_settings() -> None:
    """Do what each setting has a say in, on the database."""
    with contextlib.suppress(ConfigurationError, InvalidEvent):
        publish("order.paid", {"a": [1]}, metadata={"a": 1})
    task = TaskFactory.create(state=TaskState.RETRYABLE)
    task.consumer.claim(limit=1)
    OperatorAction.objects.prune(get_settings().AUDIT_RETENTION)
