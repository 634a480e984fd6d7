"""What fuzzing found, each as a fact that holds now."""

import itertools
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from django.core.management.base import CommandError
from django.test import Client

from kanthorq_django import Fixed, Polynomial, publish, schedule, subscribe
from kanthorq_django.conf import CEILINGS, problems
from kanthorq_django.domain.quoting import printable, quoted
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.exceptions import (
    ConfigurationError,
    InvalidBody,
    InvalidEvent,
    InvalidFilter,
    InvalidSchedule,
    InvalidSubject,
)
from kanthorq_django.models import Event, Schedule
from kanthorq_django.models.publishing.body import _fault_within, encode_body
from tests.admin.pages import page
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory
from tests.fuzz.oracle import assert_sentence
from tests.fuzz.reader import Unreadable, nested

HUGE = 10**5_000  # Python, and so pytest, refuses to write it in digits
HUGE_PARAMETER = pytest.param(HUGE, id="huge")
START = datetime(2026, 1, 5, 8, tzinfo=UTC)


def planned(**given: Any) -> Schedule:
    options: dict[str, Any] = {"rrule": "FREQ=DAILY", "dtstart": START, "subject": "report.due"}
    return schedule("report", **(options | given))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("a\nb", r"'a\nb'"),
        ("ä\u202e", r"'\xe4\u202e'"),
        pytest.param(HUGE, "<16610 bits>", id="huge"),
        ([HUGE], "[<16610 bits>]"),
        (Unreadable(), "<Unreadable"),
        (timedelta(days=1), "datetime.timedelta(days=1)"),
    ],
)
def test_any_value_is_quoted_on_one_line(value: object, told: str):
    assert quoted(value).startswith(told)
    assert quoted(value).isprintable()


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "\u202e" * 10**6, ["x" * 10**6] * 10**6, b"x" * 999]
)
def test_a_huge_value_is_quoted_at_once_and_cut(value: object):
    assert len(quoted(value)) < 100
    assert quoted(value).endswith("…")


def test_text_is_made_printable_and_cut():
    assert printable("a\x1b[31mä") == r"a\x1b[31mä"
    assert printable("ab" * 100, 10) == "ababababa…"


@pytest.mark.django_db
@pytest.mark.parametrize("value", [HUGE_PARAMETER, Unreadable()])
def test_a_value_that_cannot_be_written_down_is_refused_all_the_same(value: Any):
    for error, given in (
        (InvalidSubject, {"subject": value}),
        (ConfigurationError, {"stream": value}),
        (InvalidEvent, {"schedule_at": value}),
        (InvalidBody, {"metadata": {value: 1}}),
    ):
        with pytest.raises(error) as refused:
            publish(**({"subject": "a"} | given))
        assert_sentence(refused.value)
    for given in (
        {"timezone": value},
        {"catchup": value},
        {"dtstart": value},
        {"exdates": [value]},
    ):
        with pytest.raises(InvalidSchedule) as kept_out:
            planned(**given)
        assert_sentence(kept_out.value)
    for name in ("consumer", "attempt_max", "batch", "retry", "timeout", "deliver"):
        with pytest.raises(ConfigurationError) as undeclared:
            subscribe("a", **{"consumer": "fuzzed", name: value})(lambda message: None)
        assert_sentence(undeclared.value)
    ((told, hint),) = problems({"LISTEN": value})
    assert_sentence(ValueError(told + hint))


@pytest.mark.django_db
@pytest.mark.parametrize("number", [1e23, 1e308, 1.2345678901234567e17, -1e16, 1e16, 0.1, 5e-324])
def test_a_float_in_metadata_reads_back_as_publishing_left_it(number: float):
    published = publish("a", metadata={"n": [number]})
    (kept,) = Event.objects.get(pk=published.pk).metadata["n"]
    assert published.metadata == {"n": [kept]}
    assert float(kept) == number


def test_a_place_in_a_body_is_told_on_one_line_whatever_its_keys_are():
    with pytest.raises(InvalidBody) as refused:
        encode_body({"\x1b[31m\n": {"k" * 10_000: {1}}}, size_max=10**6)
    assert_sentence(refused.value)
    assert r"$.\x1b[31m\n.kkk" in str(refused.value)


def test_what_is_far_too_large_is_refused_before_it_is_walked():
    # Walking tells a second fault; it takes Python minutes for what it dumps in a second.
    with pytest.raises(InvalidBody, match=r"8,\d+ bytes, the limit is 1,000 "):
        encode_body([nested(1, 200), *[[]] * 2_000], size_max=1_000)


def test_json_that_python_writes_but_cannot_read_is_nested_too_deep():
    assert "nested deeper than 100 " in str(_fault_within("[" * 100_000 + "]" * 100_000))


@pytest.mark.django_db
def test_exdates_without_an_end_are_refused():
    with pytest.raises(InvalidSchedule, match="more than 1,000 moments, the limit"):
        planned(exdates=itertools.repeat(START))


@pytest.mark.parametrize("exdates", [5, None, START, "2026-01-06T08:00:00Z", b"x"])
def test_exdates_that_are_no_list_are_refused(exdates: Any):
    with pytest.raises(InvalidSchedule, match="exdates takes a list of aware datetimes, not "):
        planned(exdates=exdates)


@pytest.mark.parametrize("year", [1, 1899, 3001, 9999])
def test_exdates_that_no_rule_has_and_no_zone_can_tell_are_refused(year: int):
    with pytest.raises(InvalidSchedule, match="exdates takes the years 1900 to 3000"):
        planned(exdates=[START.replace(year=year)])


@pytest.mark.django_db
def test_a_stored_moment_that_a_zone_cannot_tell_breaks_no_page(admin_client: Client):
    kept = planned(timezone="America/New_York")
    Schedule.objects.update(exdates=["0001-01-01T00:00:00+00:00"])
    assert admin_client.get(page("schedule_change", kept.pk)).status_code == 200
    assert "01-01 00:00:00 UTC" in kanthorq("schedules", "show", "report").out


@pytest.mark.parametrize("excludes", [5, None, "order.*", itertools.repeat("a")])
def test_excludes_that_are_no_list_are_refused(excludes: Any):
    with pytest.raises(InvalidFilter, match="excludes must be a list or tuple of filters"):
        subscribe("a", consumer="fuzzed", excludes=excludes)(lambda message: None)


@pytest.mark.parametrize("option", ["atomic", "parked", "grouped"])
@pytest.mark.parametrize("value", ["no", 1, None, "maybe"])
def test_a_switch_that_is_no_bool_is_refused(declared: Registry, option: str, value: Any):
    with pytest.raises(ConfigurationError, match=f"{option} must be True or False, not "):
        subscribe("a", consumer="fuzzed", **{"batch": 2, option: value})(lambda message: None)


@pytest.mark.parametrize(
    "zone", [UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=12))]
)
def test_a_start_that_cannot_be_read_back_is_refused(zone: timezone):
    for edge in (datetime.min, datetime.max):  # noqa: DTZ901  # a zone is given
        with pytest.raises(ConfigurationError, match=r"deliver .* must be in the years 2 to 9998"):
            subscribe("a", consumer="fuzzed", deliver=edge.replace(tzinfo=zone))(lambda m: None)


@pytest.mark.parametrize("handler", [str.upper, object, dict, print])
def test_a_callable_that_cannot_be_a_handler_is_refused_in_words(handler: Any):
    with pytest.raises(ConfigurationError) as refused:
        subscribe("a")(handler)
    assert_sentence(refused.value)


@pytest.mark.parametrize("jitter", [Decimal("0.1"), "0.1", None, 1j])
def test_a_jitter_that_floats_do_not_go_with_is_refused(jitter: Any):
    with pytest.raises(ValueError, match="jitter must be between 0 and 1, not "):
        Fixed(timedelta(seconds=1), jitter=jitter)
    with pytest.raises(ValueError, match="degree must be a number from zero on, not "):
        Polynomial(degree=jitter)


@pytest.mark.parametrize("key", CEILINGS)
def test_a_setting_beyond_what_can_be_kept_is_refused(key: str):
    highest = CEILINGS[key]
    more = highest + (timedelta(1) if isinstance(highest, timedelta) else 1)
    assert list(problems({key: highest})) == []
    ((told, _hint),) = problems({key: more})
    assert "it must be at most " in told


@pytest.mark.django_db
@pytest.mark.parametrize(
    "body", ['"a"', "1.10", '{"a": 1, "a": 2}', " null ", "12345678901234567890.5"]
)
def test_checked_json_is_stored_as_it_was_given(body: str):
    ran = kanthorq("publish", "order.paid", body, "--json")
    stored = Event.objects.get(pk=ran.out.strip())
    assert bytes(stored.body) == body.encode()
    stored.json()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["publish", "a", "--file", "a\x00b"], "The body cannot be read: embedded null byte"),
        (["publish", "a", "--file", "x" * 5_000], "The body cannot be read: .*too long"),
        (["tasks", "list", "--subject", "order.\udcff"], "holds a character that is not printable"),
        (["tasks", "list", "--resource-key", "\udcff"], "holds a character that is not printable"),
        (["tasks", "list", "--consumer", "\udcff"], r"There is no consumer '\\udcff'"),
        (["schedules", "show", "a\x00"], r"There is no schedule 'a\\x00'"),
        (["prune", "--older-than", "1d", "--stream", "\udcff", "--yes"], "There is no stream"),
    ],
)
def test_what_no_name_and_no_path_can_be_is_refused_in_a_sentence(line: list[str], told: str):
    with pytest.raises(CommandError, match=told) as refused:
        kanthorq(*line)
    assert len(str(refused.value)) < 400


@pytest.mark.django_db
@pytest.mark.parametrize("limit", [0, -1, 1_000_001, 2**63, HUGE_PARAMETER, True, 1.5])
def test_a_claim_beyond_bounds_is_refused_before_any_sql(limit: Any):
    consumer = ConsumerFactory.create()
    with pytest.raises(ValueError, match="limit must be 1 to 1,000,000, not "):
        consumer.claim(limit)


@pytest.mark.django_db
@pytest.mark.parametrize("given", [HUGE_PARAMETER, Unreadable(), None, b"x" * 16, "\ud800"])
def test_what_is_no_event_id_is_refused_by_verbs(given: Any):
    with pytest.raises(ValueError, match="is not an event id; it must be a UUID"):
        ConsumerFactory.create().cancel([given])


def test_a_message_about_a_setting_does_not_repeat_all_of_it():
    ((told, _hint),) = problems({"CONCURRENCY": "x" * 10**6})
    assert len(told) < 200
