"""What exceeds a limit gets an error that names the limit and its value; nothing is written."""

import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction

from kanthorq_django import (
    Exponential,
    Fixed,
    Polynomial,
    publish,
    publish_many,
    schedule,
    subscribe,
)
from kanthorq_django.checks import check_settings
from kanthorq_django.domain.retry import WAIT_LIMIT
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.message import encode_result
from kanthorq_django.models import Consumer, Event, Schedule
from kanthorq_django.worker.options import WorkerOptions

pytestmark = pytest.mark.django_db

SMALL = {
    "BODY_SIZE_MAX": 10,
    "METADATA_SIZE_MAX": 80,
    "RESULT_SIZE_MAX": 10,
    "DEPTH_MAX": 3,
    "PUBLISH_MAX": 2,
    "FILTERS_MAX": 2,
}
START = datetime(2026, 1, 1, tzinfo=UTC)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def planned(**given: Any) -> Schedule:
    options: dict[str, Any] = {"rrule": "FREQ=DAILY", "dtstart": START, "subject": "a.due"}
    return schedule("report", **(options | given))


def subscribed(**given: Any) -> object:
    return subscribe(*given.pop("includes", ("a",)), consumer="c", **given)(lambda message: None)


def endless() -> Any:
    return (Event(subject="a") for _ in itertools.count())


EXCESSES: dict[str, tuple[Callable[[], object], str]] = {
    "body": (lambda: publish("a", "x" * 11), r"11 bytes, the limit is 10 .*BODY_SIZE_MAX"),
    "metadata": (
        lambda: publish("a", metadata={"k": "v" * 80}),
        r"89 bytes, the limit is 80 .*METADATA_SIZE_MAX",
    ),
    "result": (lambda: encode_result("x" * 11), r"13 bytes, the limit is 10 .*RESULT_SIZE_MAX"),
    "depth": (lambda: publish("a", nested(4)), r"nested deeper than 3 .*DEPTH_MAX"),
    "depth of metadata": (
        lambda: publish("a", metadata={"k": nested(4)}),
        r"nested deeper than 3 .*DEPTH_MAX",
    ),
    "events at once": (
        lambda: publish_many([Event(subject="a") for _ in range(3)]),
        r"More than 2 events .*PUBLISH_MAX",
    ),
    "events without an end": (lambda: publish_many(endless()), r"More than 2 events"),
    "includes": (
        lambda: subscribed(includes=("a", "b", "c")),
        r"3 include filters, the limit is 2 .*FILTERS_MAX",
    ),
    "excludes": (
        lambda: subscribed(excludes=("a", "b", "c")),
        r"3 exclude filters, the limit is 2 .*FILTERS_MAX",
    ),
    "characters of filters": (
        lambda: Consumer(name="c", subject_includes=["a" * 250] * 201).save(),
        "50,250 characters in all, the limit is 50,000",
    ),
    "wildcards of filters": (
        lambda: Consumer(name="c", subject_excludes=["*." * 60 + "abcdefghi"] * 350).save(),
        "11 different characters, times 21,000 wildcards .*, the limit is 200,000",
    ),
    "subject": (lambda: publish("s" * 256), "256 bytes of UTF-8, the limit is 255"),
    "subject filter": (
        lambda: subscribed(includes=("s" * 256,)),
        "256 bytes of UTF-8, the limit is 255",
    ),
    "resource key": (
        lambda: publish("a", resource_key="k" * 256),
        "resource_key has 256 characters, it must have 0 to 255",
    ),
    "idempotency key": (
        lambda: publish("a", idempotency_key="k" * 256),
        "idempotency_key has 256 characters, it must have 1 to 255",
    ),
    "stream": (lambda: publish("a", stream="s" * 129), "129 characters, the limit is 128"),
    "stream of a consumer": (
        lambda: subscribed(stream="s" * 129),
        "129 characters, the limit is 128",
    ),
    "consumer": (
        lambda: subscribe("a", consumer="c" * 129)(lambda message: None),
        "129 characters, the limit is 128",
    ),
    "schedule": (
        lambda: schedule("s" * 129, rrule="FREQ=DAILY", dtstart=START, subject="a.due"),
        "129 characters, the limit is 128",
    ),
    "due time": (
        lambda: publish("a", schedule_at=datetime.max.replace(tzinfo=UTC)),
        "must be in the years 2 to 9998",
    ),
    "rule": (
        lambda: planned(rrule="FREQ=DAILY;BYDAY=" + "MO," * 200),
        "he rule has 617 characters, the limit is 500",
    ),
    "frequency": (lambda: planned(rrule="FREQ=SECONDLY"), "MINUTELY is the limit"),
    "interval": (
        lambda: planned(rrule="FREQ=DAILY;INTERVAL=1001"),
        "INTERVAL must be 1 to 1000",
    ),
    "interval of months": (
        lambda: planned(rrule="FREQ=MONTHLY;INTERVAL=481"),
        "INTERVAL must be 1 to 480 with MONTHLY",
    ),
    "interval of years": (
        lambda: planned(rrule="FREQ=YEARLY;INTERVAL=41"),
        "INTERVAL must be 1 to 40 with YEARLY",
    ),
    "search": (
        lambda: planned(rrule="FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30"),
        "never occurs",
    ),
    "count": (lambda: planned(rrule="FREQ=DAILY;COUNT=10001"), "COUNT must be 1 to 10000"),
    "times a day": (
        lambda: planned(
            rrule="FREQ=DAILY;BYHOUR=" + ",".join(map(str, range(24))) + ";BYMINUTE=0,1,2,3,4"
        ),
        "120 times a day, the limit is 100",
    ),
    "moments left out": (
        lambda: planned(exdates=[START + timedelta(days=day) for day in range(1_001)]),
        "exdates has more than 1,000 moments, the limit",
    ),
    "visibility timeout": (
        lambda: subscribed(visibility_timeout=timedelta(hours=13)),
        "visibility_timeout must be a timedelta from 0:00:01 to 12:00:00",
    ),
    "visibility timeout that is too short": (
        lambda: subscribed(visibility_timeout=timedelta(milliseconds=999)),
        "visibility_timeout must be a timedelta from 0:00:01 to 12:00:00",
    ),
    "attempts": (
        lambda: subscribed(attempt_max=32_768),
        "attempt_max must be 1 to 32767, not 32768",
    ),
    "messages in a call": (lambda: subscribed(batch=10_001), "batch must be 1 to 10,?000"),
    "handlers at a time": (
        lambda: WorkerOptions(concurrency=1_001),
        "concurrency must be 1 to 1000, not 1001",
    ),
    "tasks of a claim": (
        lambda: WorkerOptions(batch_size=10_001),
        "batch_size must be 1 to 10000, not 10001",
    ),
}


@pytest.mark.parametrize("excess", EXCESSES)
def test_what_exceeds_a_limit_is_told_so_and_leaves_the_transaction_usable(
    excess: str, settings, declared: Registry
):
    settings.KANTHORQ = SMALL
    exceed, told = EXCESSES[excess]
    with transaction.atomic():
        with pytest.raises(KanthorqError, match=told):
            exceed()
        publish("still.usable", "x")
    assert Event.objects.count() == 1
    assert not Schedule.objects.exists()


def test_what_just_fits_is_taken(settings, declared: Registry):
    settings.KANTHORQ = SMALL
    publish("s" * 255, "x" * 10, metadata={"k": [1]}, resource_key="k" * 255)
    publish_many([Event(subject="a"), Event(subject="b")])
    publish("a", nested(3))
    subscribed(includes=("a", "b"), excludes=("c", "d"))
    assert Event.objects.count() == 4


@pytest.mark.parametrize("depth", [400, 10_000])
def test_any_depth_is_refused_in_a_sentence_also_at_the_highest_limit(settings, depth: int):
    settings.KANTHORQ = {"DEPTH_MAX": 500}
    if depth > 500:
        with pytest.raises(KanthorqError, match="nested deeper than 500"):
            publish("a", nested(depth))
    else:
        assert publish("a", nested(depth)).json()


def test_a_limit_that_python_cannot_keep_is_refused_by_the_checks(settings):
    settings.KANTHORQ = {"DEPTH_MAX": 501}
    (told,) = check_settings()
    assert told.msg == "KANTHORQ['DEPTH_MAX'] is 501; it must be at most 500."


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (lambda: Fixed(WAIT_LIMIT + timedelta(days=1)), "zero to 3650 days"),
        (lambda: Exponential(longest=WAIT_LIMIT * 2), "zero to 3650 days"),
        (lambda: Polynomial(attempt_max=32_768), "attempt_max must be 1 to 32767"),
    ],
)
def test_a_retry_policy_beyond_a_limit_is_told_so(policy: Callable[[], object], told: str):
    with pytest.raises(ValueError, match=told):
        policy()


def test_too_many_processes_are_told_so():
    with pytest.raises(CommandError, match="--processes must be 1 to 256, not 257"):
        call_command("runworker", "--processes", "257")


@pytest.mark.parametrize(("verb", "limit"), [("prune", 100_000), ("reencrypt", 10_000)])
def test_a_batch_of_a_command_has_a_limit_that_it_tells(verb: str, limit: int):
    with pytest.raises(CommandError, match=rf"{limit:,}|{limit}"):
        call_command("kanthorq", verb, "--older-than", "1d", "--batch", str(limit + 1))
