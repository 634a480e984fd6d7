"""What code declares: subscribers, retry policies, verdicts and the settings."""

from collections.abc import Callable
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

from kanthorq_django import Exponential, Fixed, Never, Polynomial, Retry, Snooze, subscribe
from kanthorq_django.conf import Settings, problems
from kanthorq_django.domain.retry import RetryPolicy
from kanthorq_django.domain.subscriptions import registry
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.worker.options import WorkerOptions
from tests.fuzz.oracle import assert_sentence, refusals
from tests.fuzz.reader import Reader

POLICIES: tuple[tuple[type[RetryPolicy], tuple[str, ...]], ...] = (
    (Polynomial, ("degree", "base")),
    (Exponential, ("base", "factor")),
    (Fixed, ("delay",)),
    (Never, ()),
)
CALLABLES: tuple[Any, ...] = (
    lambda message: None,
    lambda: None,
    len,
    str.upper,
    object,
    print,
    range,
    "order",
    None,
    timedelta(1),
)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "stream": ("default", "a b", ""),
    "consumer": ("refunds", None, "-"),
    "excludes": ((), ["order.*"], "order.>", ("..",)),
    "attempt_max": (None, 1, 16, 0, 32_768, True),
    "visibility_timeout": (timedelta(seconds=60), timedelta(0)),
    "timeout": (None, timedelta(seconds=1), timedelta.max),
    "retry": (None, Fixed(), Never(), Fixed),
    "atomic": (False, True, 1, "no"),
    "deliver": ("all", "new", "old", datetime.min, datetime.max),  # noqa: DTZ901  # naive, too
    "parked": (False, True, "maybe"),
    "serialize": (False, True, "strict", "on"),
    "batch": (1, 2, 0, 10_001),
    "grouped": (False, True, "yes"),
}


def subscribers(reader: Reader) -> None:
    """A declaration is refused naming what is wrong, or could be written as it stands."""
    given: dict[str, Any] = {"consumer": "fuzzed"}
    makers: tuple[Callable[[], Any], ...] = (reader.anything, reader.moment, reader.duration)
    for name, values in OPTIONS.items():
        if reader.chance(6):
            given[name] = reader.pick(values) if reader.chance() else reader.pick(makers)()
    includes = [reader.pick(("order.>", "*", reader.anything(), reader.text()))]
    handler: Any = reader.pick(CALLABLES) if reader.chance(6) else _handler()
    try:
        with refusals(ConfigurationError):
            subscribe(*includes, **given)(handler)
            subscription = registry.all()[-1]
            assert isinstance(subscription.parked, bool)
            assert all(isinstance(each, str) for each in subscription.excludes)
            assert timedelta(0) <= subscription.retry.next_delay(1)
    finally:
        for subscription in registry.all():
            registry.remove(subscription.consumer)


def retries(reader: Reader) -> None:
    """A policy is refused at its making, or tells a wait within its bounds for every attempt."""
    kind, own = reader.pick(POLICIES)
    given: dict[str, Any] = {}
    for name in (*own, "attempt_max", "longest", "jitter"):
        if reader.chance(3):
            makers: tuple[Callable[[], Any], ...] = (
                reader.anything,
                reader.whole,
                reader.fractional,
                reader.duration,
            )
            given[name] = reader.pick(makers)()
    with refusals(ValueError):
        policy = kind(**given)
        attempt = 1 + reader.below(32_767)
        delay = policy.next_delay(attempt, chance=reader.below(101) / 100)
        assert timedelta(0) <= delay <= policy.longest
    with refusals(ValueError):
        Retry(reader.anything())
    with refusals(ValueError):
        Snooze(reader.anything())


def settings(reader: Reader) -> None:
    """The setting KANTHORQ, whatever is in it, is accepted or told key by key, in sentences."""
    known = [field.name for field in fields(Settings)]
    declared: Any = {
        (reader.scalar() if reader.chance(5) else reader.pick(known)): reader.anything()
        for _ in range(reader.below(4))
    }
    if reader.chance(20):
        declared = reader.anything()
    told = list(problems(declared))
    for problem, hint in told:
        assert_sentence(ValueError(problem))
        assert_sentence(ValueError(hint))
    if not told and isinstance(declared, dict):
        assert Settings(**declared)


def worker_options(reader: Reader) -> None:
    """The options of a worker are refused in words, or lie within their limits."""
    given: dict[str, Any] = {
        "concurrency": 1 + reader.below(10),
        "batch_size": reader.whole(),
        "poll_interval": reader.duration(),
        "shutdown_timeout": reader.duration(),
        "max_tasks": reader.pick((None, reader.whole())),
        "pullers": tuple(reader.pick(("primary", "retry", reader.text())) for _ in range(2)),
    }
    with refusals(ConfigurationError):
        assert WorkerOptions(**given).claims


def _handler() -> Callable[[Any], None]:
    def fuzzed(message: Any) -> None:
        """Handles nothing."""

    return fuzzed
