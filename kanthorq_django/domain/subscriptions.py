"""What code subscribes to: one subscription per consumer name, kept for this process."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from inspect import isasyncgenfunction, isgeneratorfunction
from typing import Any, Literal

from asgiref.sync import iscoroutinefunction

from kanthorq_django.domain import subjects
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.retry import Polynomial, RetryPolicy

ATTEMPT_MAX = 16  # as KanthorQ has it
VISIBILITY_TIMEOUT = timedelta(seconds=60)

Handler = Callable[..., Any]


@dataclass(kw_only=True)
class Subscription:
    """A handler, what it is to be given, and how it is run and retried."""

    consumer: str
    stream: str
    handler: Handler
    includes: tuple[str, ...]
    excludes: tuple[str, ...] = ()
    attempt_max: int = ATTEMPT_MAX
    visibility_timeout: timedelta = VISIBILITY_TIMEOUT
    timeout: timedelta | None = None
    retry: RetryPolicy = field(default_factory=Polynomial)
    atomic: bool = False
    deliver: str | datetime = "all"
    parked: bool = False
    serialize: bool | Literal["strict"] = False
    batch: int = 1
    grouped: bool = False
    cancel_handler: Handler | None = None
    cancel_retry: RetryPolicy | None = None
    cancel_timeout: timedelta | None = None

    def selects(self, subject: str) -> bool:
        """Tell whether the filters that are declared here select ``subject``."""
        return subjects.selects(self.includes, self.excludes, subject)

    @property
    def place(self) -> str:
        """Where the handler is defined, as ``module.function``."""
        return name_of(self.handler)

    def redeclares(self, former: "Subscription") -> bool:
        """Tell whether this is ``former`` once more, from a module that was imported anew.

        Subscribers that one function declares, in a loop for example, have one origin; those that
        select something else are other ones. Two that select the same cannot be told apart.
        """
        return self.handler is not former.handler and _origin(self) == _origin(former)

    @cached_property
    def is_async(self) -> bool:
        return is_coroutine(self.handler)

    @property
    def is_cancel_async(self) -> bool:
        """Whether a coroutine handles cancellations; without a handler of its own, ``is_async``."""
        return is_coroutine(self.cancel_handler or self.handler)

    @property
    def group_size(self) -> int:
        """How many tasks of one resource key are handled together."""
        return self.batch if self.grouped else 1

    @property
    def cancel_policy(self) -> RetryPolicy:
        return self.cancel_retry or self.retry

    @property
    def cancel_attempt_max(self) -> int:
        """How often a cancellation handler is tried, whatever its main handler used up."""
        if self.cancel_retry is None:
            return self.retry.attempt_max or self.attempt_max
        return self.cancel_retry.attempt_max or ATTEMPT_MAX


def is_coroutine(handler: object) -> bool:
    """Tell whether a call of ``handler``, a function or an object, has to be awaited."""
    return any(map(iscoroutinefunction, _called(handler)))


def is_generator(handler: object) -> bool:
    """Tell whether a call of ``handler`` returns a generator, and runs none of its body."""
    return any(isgeneratorfunction(each) or isasyncgenfunction(each) for each in _called(handler))


def name_of(handler: object) -> str:
    """Return ``module.function``, or what else tells the reader which handler it is."""
    if name := getattr(handler, "__qualname__", None):
        return f"{getattr(handler, '__module__', '?')}.{name}"
    return quoted(handler)


def _called(handler: object) -> tuple[object, object]:
    """Return what to ask how a call will run: the handler, and the method if it is an object."""
    return handler, getattr(type(handler), "__call__", None)  # noqa: B004  # the method is asked about


def _origin(subscription: Subscription) -> tuple[object, ...]:
    code = getattr(inspect.unwrap(subscription.handler), "__code__", None)
    selected = (subscription.stream, subscription.includes, subscription.excludes)
    return subscription.place, getattr(code, "co_firstlineno", None), selected


class Registry:
    """Every subscription of this process, in the order of their declaration."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, Subscription] = {}
        # Pairs that claim the same consumer name.
        self.duplicates: list[tuple[Subscription, Subscription]] = []

    def add(self, subscription: Subscription) -> None:
        """Register; the last subscriber of a consumer has it, a check reports the others."""
        former = self._subscriptions.get(subscription.consumer)
        if former is not None and not subscription.redeclares(former):
            self.duplicates.append((former, subscription))
        self._subscriptions[subscription.consumer] = subscription

    def remove(self, consumer: str) -> None:
        """Forget the subscription of ``consumer``, for tests that declare their own."""
        self._subscriptions.pop(consumer, None)
        self.duplicates = [pair for pair in self.duplicates if pair[0].consumer != consumer]

    def find(self, consumer: str) -> Subscription | None:
        return self._subscriptions.get(consumer)

    def all(self) -> list[Subscription]:
        return list(self._subscriptions.values())


registry = Registry()


def policy_for(consumer: str, *, is_cancellation: bool) -> RetryPolicy:
    """Return the policy that says when a failed attempt of ``consumer`` is repeated."""
    subscription = registry.find(consumer)
    if subscription is None:
        return Polynomial()
    return subscription.cancel_policy if is_cancellation else subscription.retry
