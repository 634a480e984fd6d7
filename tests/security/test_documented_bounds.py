"""docs/settings.md lists every setting with its default, and every bound with its number."""

import re
from dataclasses import MISSING, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings

from kanthorq_django.admin import content, operations, paginator
from kanthorq_django.conf import SECRET_KEYS, Settings, problems
from kanthorq_django.declarations import (
    BATCH_MAX,
    VISIBILITY_TIMEOUT_MAX,
    VISIBILITY_TIMEOUT_MIN,
)
from kanthorq_django.domain import failures, moments, names, recurrence, rules, subjects
from kanthorq_django.domain.retry import ATTEMPT_LIMIT, WAIT_LIMIT
from kanthorq_django.management.commands.runworker import PROCESSES_LIMIT
from kanthorq_django.models import audit, consumer
from kanthorq_django.models.delivery import leased
from kanthorq_django.models.maintenance import retention
from kanthorq_django.models.moves import CHUNK_SIZE
from kanthorq_django.models.publishing import envelope, idempotency
from kanthorq_django.models.scheduling import definition, occurrences
from kanthorq_django.worker.options import CONCURRENCY_LIMIT
from tests.security.test_bounds import EXCESSES

S = Settings()
HOUR = timedelta(hours=1)

# What a row begins with, the numbers that have to stand in it, and the tests that go beyond it.
REFUSED: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "body, result": ((S.BODY_SIZE_MAX, S.RESULT_SIZE_MAX), ("body", "result")),
    "metadata": ((S.METADATA_SIZE_MAX,), ("metadata",)),
    "levels of JSON": ((S.DEPTH_MAX,), ("depth", "depth of metadata")),
    "subject, subject filter": ((subjects.SUBJECT_SIZE_MAX,), ("subject", "subject filter")),
    "resource key, idempotency key": (
        (envelope.KEY_SIZE_MAX,),
        ("resource key", "idempotency key"),
    ),
    "name of a stream, consumer or schedule": (
        (names.NAME_SIZE_MAX,),
        ("stream", "stream of a consumer", "consumer", "schedule"),
    ),
    "`schedule_at`, `deliver`": ((moments.YEAR_MIN, moments.YEAR_MAX), ("due time",)),
    "events of one `publish_many()`": (
        (S.PUBLISH_MAX,),
        ("events at once", "events without an end"),
    ),
    "events in one statement": (
        (idempotency.STATEMENT_ROWS_MAX, idempotency.STATEMENT_SIZE_MAX // 2**20),
        (),  # more go through COPY, without an error
    ),
    "hops of a chain": ((), ()),  # test_hops.py
    "filters of a consumer": ((S.FILTERS_MAX,), ("includes", "excludes")),
    "all includes, or all excludes,": (
        (
            subjects.FILTERS_SIZE_MAX,
            subjects.FILTERS_COST_MAX,
            subjects.CHARACTERS_PER_WILDCARD,
        ),
        ("characters of filters", "wildcards of filters"),
    ),
    "`visibility_timeout`": (
        (VISIBILITY_TIMEOUT_MIN.seconds, VISIBILITY_TIMEOUT_MAX // HOUR),
        ("visibility timeout", "visibility timeout that is too short"),
    ),
    "`attempt_max`": ((ATTEMPT_LIMIT,), ("attempts",)),
    "messages of one call": ((BATCH_MAX,), ("messages in a call",)),
    "wait before a retry": ((WAIT_LIMIT.days,), ()),  # the policies' own test
    "recurrence rule": (
        (
            rules.TEXT_SIZE_MAX,
            rules.COUNT_MAX,
            rules.INTERVAL_MAX,
            rules.INTERVALS_MAX["YEARLY"],
            rules.INTERVALS_MAX["MONTHLY"],
            rules.TIMES_MAX,
        ),
        (
            *("rule", "frequency", "interval", "interval of months", "interval of years"),
            *("count", "times a day"),
        ),
    ),
    "search for an occurrence": ((recurrence.DAYS_TRIED_MAX,), ("search",)),
    "moments left out": (
        (definition.EXDATES_MAX, recurrence.YEAR_MIN, recurrence.YEAR_MAX),
        ("moments left out",),
    ),
    "`limit` of `pull()`": ((consumer.LIMIT_MAX,), ()),  # tests of findings go beyond it
    "occurrences of one schedule in a turn": ((occurrences.BATCH_SIZE, occurrences.TURN_SIZE), ()),
}
CUT: dict[str, tuple[int, ...]] = {
    "events that a pull reads": (S.PAGE_SIZE,),
    "tasks that a pull or claim leases": (S.BATCH_SIZE,),
    "bodies that a pull or claim leases": (leased.BODIES_SIZE_MAX // 2**20,),
    "handlers at a time": (S.CONCURRENCY, CONCURRENCY_LIMIT, PROCESSES_LIMIT),
    "errors kept of a task": (S.ERRORS_MAX, failures.LINE_SIZE_MAX, S.ERROR_SIZE_MAX),
    "tasks that an operator's action moves": (operations.BATCH_SIZE, CHUNK_SIZE),
    "ids and values kept of an operator's action": (audit.SAMPLE_SIZE,),
    "events that prune looks at": (1_000, retention.BATCH_MAX),
    "a body on a page": (content.READ_MAX, content.SHOWN_MAX),
    "rows that a page counts": (paginator.COUNT_MAX, paginator.PAGES_MAX),
}


def tables() -> list[list[str]]:
    """Return the rows of each table of the page, without its head."""
    text = (Path(django_settings.BASE_DIR) / "docs" / "settings.md").read_text()
    found = re.findall(r"^\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [table.splitlines() for table in found]


def row_of(rows: list[str], beginning: str) -> str:
    (row,) = [row for row in rows if row.startswith(f"| {beginning}")]
    return row


def numbers(text: str) -> set[int]:
    return {int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)}


def test_every_setting_stands_in_the_documentation_with_its_default():
    rows, _, _ = tables()
    assert len(rows) == len(fields(Settings))
    for field in fields(Settings):
        default = row_of(rows, f"`{field.name}`").split("|")[2].strip()
        assert default == told(field.default) or field.name == "REDACTED_KEYS"


def told(default: Any) -> str:
    if isinstance(default, timedelta):
        return f"{default.days} days" if default.days else f"{default.seconds} s"
    assert default is not MISSING
    return f"{default:,}" if type(default) is int else str(default)


def test_the_keys_that_are_redacted_are_named():
    text = (Path(django_settings.BASE_DIR) / "docs" / "settings.md").read_text()
    for key in SECRET_KEYS:
        assert key in text


@pytest.mark.parametrize("beginning", REFUSED)
def test_a_limit_is_documented_as_it_is(beginning: str):
    _, rows, _ = tables()
    wanted, excesses = REFUSED[beginning]
    assert set(wanted) <= numbers(row_of(rows, beginning))
    assert set(excesses) <= EXCESSES.keys()


@pytest.mark.parametrize("beginning", CUT)
def test_what_is_cut_is_documented_as_it_is(beginning: str):
    _, _, rows = tables()
    assert set(CUT[beginning]) <= numbers(row_of(rows, beginning))


def test_no_limit_is_documented_that_is_not_tested():
    _, refused, cut = tables()
    assert len(refused) == len(REFUSED)
    assert len(cut) == len(CUT)
    tested = {name for _, excesses in REFUSED.values() for name in excesses}
    assert EXCESSES.keys() - tested == {"handlers at a time", "tasks of a claim"}


@pytest.mark.parametrize("key", [field.name for field in fields(Settings) if field.type is int])
@pytest.mark.parametrize("value", [0, -1, 1.5, "10", None, True])
def test_a_bound_that_is_none_is_refused_with_what_it_may_be(key: str, value: object):
    ((problem, _hint),) = problems({key: value})
    assert problem == f"KANTHORQ['{key}'] is {value!r}; it must be a whole number above 0."
