"""What code declares about consumers, and what is refused."""

import functools
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pytest_django import Settings

from kanthorq_django import Exponential, Fixed, Never, Polynomial, subscribe
from kanthorq_django.domain.subscriptions import Registry, Subscription
from kanthorq_django.exceptions import ConfigurationError, InvalidFilter
from kanthorq_django.subscribers import find
from tests.clock import BrokenZone

SECOND = timedelta(seconds=1)


def handle(message: Any) -> None:
    """Does nothing, well."""


async def handle_async(message: Any) -> None:
    """Does nothing, later."""


class HandlesAsync:
    async def __call__(self, message: Any) -> None:
        """Does nothing, later."""


def declare(*includes: str, consumer: str = "repayments", **options: Any) -> Subscription:
    """Subscribe a fresh handler and return what was noted of it."""

    def refund(message: Any) -> None:
        """A handler of its own, so that it can have attributes of its own."""

    subscribe(*includes or (">",), consumer=consumer, **options)(refund)
    return find(consumer)


def test_a_subscriber_stays_the_function_that_it_was() -> None:
    def refund(message: Any) -> str:
        return f"refunded {message}"

    subscribed = subscribe("order.cancelled", consumer="repayments")(refund)

    assert subscribed is refund
    assert subscribed("order 17") == "refunded order 17"
    assert find("repayments").handler is refund


def test_an_object_that_handles_gets_the_name_of_its_class_unless_it_has_one() -> None:
    plain, named = HandlesAsync(), HandlesAsync()
    vars(named)["__name__"] = "refund"
    for handler, name in ((plain, "HandlesAsync"), (named, "refund")):
        assert subscribe("order.>", consumer="repayments")(handler).__name__ == name


def test_a_declaration_is_noted_with_every_option() -> None:
    moment = datetime(2026, 11, 20, tzinfo=UTC)
    retry = Exponential(attempt_max=7)
    options: dict[str, Any] = {
        "stream": "orders",
        "visibility_timeout": 5 * SECOND,
        "timeout": SECOND,
        "retry": retry,
        "atomic": True,
        "deliver": moment,
        "parked": True,
    }
    noted = declare("order.cancelled", "order.refunded.>", excludes=["order.refunded.x"], **options)
    assert {name: getattr(noted, name) for name in options} == options
    assert noted.includes == ("order.cancelled", "order.refunded.>")
    assert noted.excludes == ("order.refunded.x",)
    assert noted.attempt_max == 7


def test_the_defaults_are_kanthorqs() -> None:
    noted = declare("order.>")
    assert (noted.stream, noted.attempt_max, noted.retry) == ("default", 16, Polynomial())
    assert (noted.visibility_timeout, noted.timeout) == (60 * SECOND, None)
    assert (noted.deliver, noted.parked, noted.atomic, noted.excludes) == ("all", False, False, ())


def test_a_consumer_is_called_after_its_app_and_function_unless_told() -> None:
    subscribe("order.>")(handle)
    assert find("tests.handle").handler is handle


def test_the_policy_says_how_many_attempts_unless_the_consumer_does() -> None:
    assert declare(retry=Never()).attempt_max == 1
    assert declare(attempt_max=3).attempt_max == 3
    assert declare(attempt_max=3, retry=Fixed(attempt_max=3)).attempt_max == 3


def test_an_async_handler_and_a_callable_object_may_subscribe() -> None:
    class Refund:
        def __call__(self, message: Any) -> None: ...

    subscribe("order.>", consumer="async")(handle_async)
    subscribe("order.>", consumer="object")(Refund())
    subscribe("order.>", consumer="partial")(functools.partial(lambda extra, message: None, 1))
    for name in ("async", "object", "partial"):
        assert find(name).consumer == name


def test_two_subscribers_of_one_consumer_are_recorded(declared: Registry) -> None:
    before = len(declared.duplicates)
    first = declare("order.>")
    subscribe("order.>", consumer="repayments")(handle)
    ((one, other),) = declared.duplicates[before:]
    assert one is first
    assert other is find("repayments")


def test_an_unknown_consumer_is_answered_with_near_ones() -> None:
    declare()
    with pytest.raises(ConfigurationError, match="'repaymnts'; did you mean 'repayments'"):
        find("repaymnts")
    with pytest.raises(ConfigurationError, match=r"'zzzzzz'; known: '.+', …$"):
        find("zzzzzz")


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        (["order..paid"], "include filter 'order..paid' is not valid: it has an empty token"),
        ([">.paid"], "'>' may only stand last"),
        (["a.**"], "contains a wildcard"),
        (["a b"], "contains a space"),
        (["a\x00"], "not printable"),
        ([""], "it is empty"),
        (["x" * 256], "256 bytes"),
        ([None], "must be a str, not NoneType"),
        (["a"] * 65, "has 65 include filters, the limit is 64"),
    ],
)
def test_a_bad_filter_is_refused(patterns: list[str], problem: str) -> None:
    with pytest.raises(InvalidFilter, match=f"(?s)'repayments'.*{problem}"):
        declare(*patterns)
    problem = problem.replace("include", "exclude")
    with pytest.raises(InvalidFilter, match=f"(?s)'repayments'.*{problem}"):
        declare(">", excludes=patterns)


def test_the_project_sets_the_number_of_filters(settings: Settings) -> None:
    settings.KANTHORQ = {"FILTERS_MAX": 2}
    declare("a", "b", excludes=("c", "d"))
    with pytest.raises(InvalidFilter, match="the limit is 2"):
        declare("a", "b", "c")


def test_filters_that_are_too_much_for_postgresql_are_refused(settings: Settings) -> None:
    settings.KANTHORQ = {"FILTERS_MAX": 1_000}
    patterns = [f"{number}.{'x' * 240}" for number in range(300)]
    with pytest.raises(InvalidFilter, match=r"'repayments': the include filters .*limit is 50,000"):
        declare(*patterns)
    with pytest.raises(InvalidFilter, match=r"'repayments': the exclude filters .*limit is 50,000"):
        declare(">", excludes=patterns)


def test_a_subscriber_without_a_filter_is_refused() -> None:
    with pytest.raises(InvalidFilter, match="has no subject filter; use '>'"):
        subscribe(consumer="repayments")(handle)
    with pytest.raises(InvalidFilter, match=r"@subscribe\('order.>'\)"):
        subscribe(handle)  # type: ignore[arg-type]  # a decorator without its brackets


@pytest.mark.parametrize("given", ["orders", {"b", "c"}, {"b": 1}])
def test_what_is_no_list_of_excludes_is_refused(given: Any) -> None:
    with pytest.raises(InvalidFilter, match="excludes must be a list or tuple"):
        declare("order.>", excludes=given)


def takes_nothing() -> None: ...


def takes_two(message: Any, other: Any) -> None: ...


def generates(message: Any) -> Iterator[None]:
    yield


async def generates_async(message: Any) -> AsyncIterator[None]:
    yield


class Generates:
    def __call__(self, message: Any) -> Iterator[None]:
        yield


class GeneratesAsync:
    async def __call__(self, message: Any) -> AsyncIterator[None]:
        yield


class Unreadable:
    __signature__ = 1

    def __call__(self, message: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("handler", "problem"),
    [
        (None, "must be callable"),
        ("shop.refund", "must be callable"),
        (takes_nothing, r"takes_nothing must take one argument, .* with \(\) -> None"),
        (takes_two, r"takes_two must take one argument, .* with \(\w+: .*, \w+: .*\)"),
        (functools.partial(takes_two, 1, 2), "must take one argument"),
        (generates, "generates is a generator, which would never run"),
        (generates_async, "generates_async is a generator"),
        (Generates(), "Generates object at .* is a generator"),
        (GeneratesAsync(), "GeneratesAsync object at .* is a generator"),
        (Unreadable(), "Unreadable object at .* cannot be a handler: unexpected object"),
    ],
)
def test_what_cannot_handle_a_message_is_refused(handler: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        subscribe("order.>", consumer="repayments")(handler)
    declared_handler: Any = declare().handler
    with pytest.raises(ConfigurationError, match=problem):
        declared_handler.on_cancel()(handler)


def test_a_handler_that_takes_no_attribute_is_refused(declared: Registry) -> None:
    before = declared.all()
    with pytest.raises(ConfigurationError, match="takes no attribute; use a function"):
        subscribe("order.>", consumer="repayments")([].append)
    assert declared.all() == before


def test_what_has_no_name_needs_one() -> None:
    with pytest.raises(ConfigurationError, match="give consumer="):
        subscribe("order.>")(functools.partial(handle))
    with pytest.raises(ConfigurationError, match=r"cannot name a consumer: .*; give consumer="):
        subscribe("order.>")(lambda message: None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"consumer": ""}, "cannot name a consumer"),
        ({"consumer": "a b"}, "'a b' cannot name a consumer"),
        ({"consumer": "x" * 129}, "129 characters, the limit is 128"),
        ({"stream": "a/b"}, "Consumer 'repayments': 'a/b' cannot name a stream"),
        ({"stream": None}, "Consumer 'repayments': None cannot name a stream: it must be a str"),
        ({"attempt_max": 0}, "attempt_max must be 1 to 32767, not 0"),
        ({"attempt_max": -1}, "attempt_max must be"),
        ({"attempt_max": 32_768}, "attempt_max must be"),
        ({"attempt_max": True}, "attempt_max must be"),
        ({"attempt_max": 1.0}, "attempt_max must be"),
        ({"attempt_max": "5"}, "attempt_max must be"),
        (
            {"attempt_max": 3, "retry": Never()},
            "Consumer 'repayments': attempt_max is 3, but its retry policy says 1; give one",
        ),
        ({"retry": 5}, "retry must be a retry policy"),
        ({"retry": Fixed}, "retry must be a retry policy"),
        ({"visibility_timeout": timedelta(0)}, "visibility_timeout must be .*0:00:01 to 12:00:00"),
        ({"visibility_timeout": -5 * SECOND}, "visibility_timeout"),
        ({"visibility_timeout": timedelta(milliseconds=10)}, "visibility_timeout"),
        ({"visibility_timeout": timedelta(hours=12, seconds=1)}, "visibility_timeout"),
        ({"visibility_timeout": timedelta.max}, "visibility_timeout"),
        ({"visibility_timeout": 30}, "visibility_timeout must be a timedelta"),
        ({"visibility_timeout": 0.01}, "visibility_timeout"),
        ({"visibility_timeout": float("nan")}, "visibility_timeout"),
        ({"visibility_timeout": 1e18}, "visibility_timeout"),
        ({"visibility_timeout": "30"}, "visibility_timeout"),
        ({"visibility_timeout": True}, "visibility_timeout"),
        ({"visibility_timeout": None}, "visibility_timeout"),
        ({"timeout": timedelta(0)}, "timeout must be a timedelta above zero or None"),
        ({"timeout": 5}, "timeout must be"),
        ({"deliver": "latest"}, "deliver must be 'all', 'new' or an aware datetime"),
        ({"deliver": None}, "deliver must be"),
        ({"deliver": datetime(2026, 11, 20)}, "deliver must be"),  # noqa: DTZ001  # so it is
        ({"deliver": 0}, "deliver must be"),
        ({"deliver": datetime.max.replace(tzinfo=UTC)}, "deliver .*in the years 2 to 9998"),
        ({"deliver": datetime(2026, 1, 1, tzinfo=BrokenZone())}, "deliver has a time zone that"),
        ({"batch": 0}, "batch must be 1 to 10000, not 0"),
        ({"batch": 10_001}, "batch must be"),
        ({"batch": True}, "batch must be"),
        ({"grouped": True}, "say how many with batch"),
        ({"serialize": "yes"}, "serialize must be False, True or 'strict'"),
        ({"serialize": 1}, "serialize must be False, True or 'strict', not 1"),
    ],
)
def test_a_bad_option_is_refused_and_nothing_is_declared(
    options: dict[str, Any], problem: str, declared: Registry
) -> None:
    before = declared.all()
    with pytest.raises(ConfigurationError, match=f"(?s){problem}"):
        subscribe("order.>", **({"consumer": "repayments"} | options))(handle)
    assert declared.all() == before


@pytest.mark.parametrize("visibility", [SECOND, timedelta(hours=12)])
def test_the_edges_of_a_visibility_timeout_are_allowed(visibility: timedelta) -> None:
    assert declare(visibility_timeout=visibility).visibility_timeout == visibility


@pytest.mark.parametrize("handle_async", [handle_async, HandlesAsync()])
def test_an_async_handler_cannot_be_atomic(handle_async: Any) -> None:
    with pytest.raises(ConfigurationError, match="atomic=True needs a plain function"):
        subscribe("order.>", consumer="repayments", atomic=True)(handle_async)
    handler: Any = declare(atomic=True).handler
    with pytest.raises(ConfigurationError, match="atomic=True needs a plain function"):
        handler.on_cancel()(handle_async)
