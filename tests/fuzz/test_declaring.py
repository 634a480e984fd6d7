"""Subscribers, schedules, settings: refused where they are declared, or good for what follows."""

from dataclasses import fields
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any
from zoneinfo import available_timezones

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
from kanthorq_django.models import Consumer, OperatorAction, Schedule, Task, TaskState
from kanthorq_django.subscribers import sync
from tests.factories import TaskFactory
from tests.fuzz.adversarial import (
    anything,
    durations,
    examples,
    few_odd,
    json_values,
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
options = few_odd(
    {},
    {
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
@given(includes=mostly(["order.>"], st.lists(filters | anything, max_size=3)), given=options)
def test_a_declared_subscriber_can_be_registered(
    declared: Registry, includes: list[Any], given: dict[str, Any]
):
    with knocked(ConfigurationError):
        subscribe(*includes, consumer="fuzzed", **given)(lambda message: None)
        (consumer,) = sync(["fuzzed"])
        stored = Consumer.objects.get(pk=consumer.pk)
        assert stored.subject_includes == list(includes)
        assert stored.subject_excludes == list(given.get("excludes", ()))
        assert stored.timeout == given.get("timeout")
        assert stored.parked == given.get("parked", False)
        stored.delete()


RULES = ("FREQ=MONTHLY;BYDAY=-1FR", "FREQ=WEEKLY;BYDAY=MO;COUNT=3", "FREQ=MINUTELY;INTERVAL=90")
years = st.datetimes(datetime(1890, 1, 1), datetime(3060, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  # the bounds
definitions = few_odd(
    {
        "name": "report",
        "rrule": "FREQ=DAILY",
        "dtstart": datetime(2026, 1, 5, 8, tzinfo=UTC),
        "subject": "report.due",
    },
    {
        "name": names | anything,
        "rrule": st.sampled_from(RULES) | texts | anything,
        "dtstart": years | moments | anything,
        "subject": subjects | anything,
        "timezone": st.sampled_from(sorted(available_timezones())) | names | anything,
        "exdates": st.lists(years | moments, max_size=3)
        | st.lists(anything, max_size=3)
        | anything,
        "body": anything,
        "metadata": st.dictionaries(texts, json_values, max_size=3) | anything,
        "stream": names | anything,
        "resource_key": names | anything,
        "catchup": st.sampled_from(("all", "none")) | names | anything,
    },
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


KINDS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(1, 1_000) | st.integers(1) | numbers,
    int | None: st.integers(1) | st.none() | numbers,
    bool: st.booleans() | anything,
    timedelta: durations | anything,
    str | None: st.none() | names,
    tuple[str, ...]: st.lists(texts, max_size=3) | anything,
}
kinds = {field.name: KINDS[field.type] for field in fields(Settings)}
# The keys are bad unless they are Fernet's; the tests of encryption have those.
usable = few_odd({}, {name: kind for name, kind in kinds.items() if name != "BODY_KEYS"}, most=3)


@pytest.fixture
def task(db: None) -> Task:
    retried: Task = TaskFactory.create(state=TaskState.RETRYABLE)
    return retried


@examples(100)
@given(
    declared_as=usable
    | st.dictionaries(st.sampled_from(sorted(kinds)) | texts | st.integers(), anything, max_size=3)
)
def test_settings_are_refused_by_name_or_good_for_work(task: Task, declared_as: dict[Any, Any]):
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
                publish("order.paid", {"a": [1]}, metadata={"a": 1})
            with knocked():
                task.consumer.claim(limit=get_settings().BATCH_SIZE)
                OperatorAction.objects.prune(get_settings().AUDIT_RETENTION)
