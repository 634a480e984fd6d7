"""``@subscribe``: what code declares in ``<app>/subscribers.py``, and what is made of it.

Nothing here touches the database until ``sync()``, so it can be imported at any time.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

from django.utils import timezone

from kanthorq_django.conf import get_settings
from kanthorq_django.domain import subjects
from kanthorq_django.domain.names import name_problem
from kanthorq_django.domain.retry import ATTEMPT_LIMIT, Polynomial, RetryPolicy
from kanthorq_django.domain.subscriptions import Subscription, registry
from kanthorq_django.exceptions import ConfigurationError, InvalidFilter

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer, Registration

ATTEMPT_MAX = 16
VISIBILITY_TIMEOUT_MIN = timedelta(seconds=1)
VISIBILITY_TIMEOUT_MAX = timedelta(hours=12)
BATCH_MAX = 10_000  # messages in one call
STARTS = ("all", "new")

__all__ = ["Subscriber", "registry", "subscribe", "sync"]

R_co = TypeVar("R_co", covariant=True)
C = TypeVar("C", bound=Callable[..., Any])


class Subscriber(Protocol[R_co]):
    """A handler as ``@subscribe`` leaves it: the same callable, with one attribute more."""

    def __call__(self, message: Any) -> R_co: ...

    def on_cancel(
        self, *, retry: RetryPolicy | None = None, timeout: timedelta | None = None
    ) -> Callable[[C], C]:
        """Let the decorated function clean up after a cancelled task.

        ``retry`` defaults to the handler's own policy; the attempts are counted anew.
        """
        ...


def subscribe(  # noqa: PLR0913  # the options of a subscriber, by keyword only
    *includes: str,
    stream: str = "default",
    consumer: str | None = None,
    excludes: Collection[str] = (),
    attempt_max: int | None = None,
    visibility_timeout: timedelta = timedelta(seconds=60),
    timeout: timedelta | None = None,
    retry: RetryPolicy | None = None,
    atomic: bool = False,
    deliver: str | datetime = "all",
    parked: bool = False,
    serialize: bool | Literal["strict"] = False,
    batch: int = 1,
    grouped: bool = False,
) -> Callable[[Callable[[Any], R_co]], Subscriber[R_co]]:
    """Let the decorated function handle each event of ``stream`` that ``includes`` select.

    It is called with a ``Message`` and stays a plain callable; it may be ``async def``.
    ``consumer`` defaults to ``<module's app>.<function>``. ``atomic`` runs it and its
    acknowledgement in one transaction: exactly-once effects. ``deliver`` says where a new
    consumer starts: ``"all"``, ``"new"`` or an aware datetime. ``attempt_max`` defaults to
    the retry policy's, else 16. ``serialize`` runs tasks with the same resource key one at a
    time: True lets later ones pass a task that waits for its retry, ``"strict"`` does not.
    With ``batch`` above 1 the function is called with a list of at most that many messages;
    ``grouped`` gives it those of one resource key, in the order of publishing.

    Raises ConfigurationError naming what is wrong.
    """
    policy = Polynomial() if retry is None else retry
    _check_spelling(includes, excludes)

    def register(handler: Callable[[Any], R_co]) -> Subscriber[R_co]:
        _check_handler(handler)
        name = _default_name(handler) if consumer is None else consumer
        _check_retry(name, policy)
        subscription = Subscription(
            consumer=name,
            stream=stream,
            handler=handler,
            includes=tuple(includes),
            excludes=tuple(excludes),
            attempt_max=_attempt_max(attempt_max, policy),
            visibility_timeout=visibility_timeout,
            timeout=timeout,
            retry=policy,
            atomic=atomic,
            deliver=deliver,
            parked=parked,
            serialize=serialize,
            batch=batch,
            grouped=grouped,
        )
        _check(subscription)
        subscriber = _with_on_cancel(handler, subscription)
        registry.add(subscription)
        return subscriber

    return register


def sync(consumers: Iterable[str] | None = None, *, using: str | None = None) -> "list[Consumer]":
    """Write what code declares about ``consumers`` (None: all) into the database.

    Returns their rows. Changed filters and options apply from then on. A consumer that is no
    longer declared keeps its row and its tasks. Raises ConfigurationError for a name that no
    code declares.
    """
    from django.db import router

    from kanthorq_django.models import Consumer

    alias = using or router.db_for_write(Consumer)
    return [
        Consumer.objects.using(alias).register(subscription.consumer, _registration(subscription))
        for subscription in _chosen(consumers)
    ]


def _with_on_cancel(handler: Callable[[Any], R_co], subscription: Subscription) -> Subscriber[R_co]:
    def on_cancel(
        *, retry: RetryPolicy | None = None, timeout: timedelta | None = None
    ) -> Callable[[C], C]:
        def register(cancel_handler: C) -> C:
            _check_handler(cancel_handler)
            _check_atomic(subscription, cancel_handler)
            _check_timeout(subscription.consumer, timeout)
            if retry is not None:
                _check_retry(subscription.consumer, retry)
            subscription.cancel_handler = cancel_handler
            subscription.cancel_retry = retry
            subscription.cancel_timeout = timeout
            return cancel_handler

        return register

    try:
        handler.on_cancel = on_cancel  # type: ignore[attr-defined]  # functions take attributes
    except AttributeError as error:
        raise ConfigurationError(
            f"{_name(handler)} cannot be a handler, as it takes no attribute; use a function."
        ) from error
    return cast("Subscriber[R_co]", handler)


def _chosen(consumers: Iterable[str] | None) -> list[Subscription]:
    if consumers is None:
        return registry.all()
    return [find(consumer) for consumer in consumers]


def find(consumer: str) -> Subscription:
    """Return the subscription of ``consumer``.

    Raises ConfigurationError, with near matches, when no code declares it.
    """
    if subscription := registry.find(consumer):
        return subscription
    known = [subscription.consumer for subscription in registry.all()]
    near = difflib.get_close_matches(consumer, known, n=3)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"known: {sorted(known)}."
    raise ConfigurationError(f"No subscriber declares the consumer {consumer!r}; {hint}")


def _registration(subscription: Subscription) -> "Registration":
    from kanthorq_django.models.consumer import Registration

    return Registration(
        stream=subscription.stream,
        includes=subscription.includes,
        excludes=subscription.excludes,
        attempt_max=subscription.attempt_max,
        visibility_timeout=subscription.visibility_timeout,
        timeout=subscription.timeout,
        parked=subscription.parked,
        serialize=_serialize(subscription),
        deliver=subscription.deliver,
        has_cancel_handler=subscription.cancel_handler is not None,
        cancel_attempt_max=subscription.cancel_attempt_max,
    )


def _serialize(subscription: Subscription) -> str:
    from kanthorq_django.models.turns import Serialize

    if subscription.serialize == "strict":
        return str(Serialize.STRICT.value)
    # A group is all of one key, so two groups of a key never run side by side.
    is_on = subscription.serialize or subscription.grouped
    return str(Serialize.ON.value if is_on else Serialize.OFF.value)


def _attempt_max(given: int | None, policy: RetryPolicy) -> int:
    if given is not None and policy.attempt_max not in (None, given):
        raise ConfigurationError(
            f"attempt_max is {given}, but its retry policy says {policy.attempt_max}; give one."
        )
    return (policy.attempt_max or ATTEMPT_MAX) if given is None else given


def _check_handler(handler: object) -> None:
    if not callable(handler):
        raise ConfigurationError(f"A handler must be callable, not {handler!r}.")
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise ConfigurationError(f"{_name(handler)} is a generator, which would never run.")
    try:
        inspect.signature(handler).bind(object())
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{_name(handler)} must take one argument, the message: {error}."
        ) from error


def _name(handler: object) -> str:
    if name := getattr(handler, "__qualname__", None):
        return f"{getattr(handler, '__module__', '?')}.{name}"
    return repr(handler)


def _default_name(handler: object) -> str:
    name = getattr(handler, "__name__", None)
    if name is None:
        raise ConfigurationError(f"{_name(handler)} has no name of its own; give consumer=….")
    return f"{handler.__module__.split('.')[0]}.{name}"


def _check_spelling(includes: tuple[object, ...], excludes: object) -> None:
    """Refuse what Python would take for something else: a bare decorator, a str as a list."""
    if any(callable(pattern) for pattern in includes):
        raise InvalidFilter("@subscribe needs subject filters: @subscribe('order.>').")
    if isinstance(excludes, str):
        raise InvalidFilter(f"excludes must be a list or tuple of filters, not {excludes[:80]!r}.")


def _check(subscription: Subscription) -> None:
    name = subscription.consumer
    for noun, given in (("consumer", name), ("stream", subscription.stream)):
        if problem := name_problem(given):
            raise ConfigurationError(f"{str(given)[:80]!a} cannot name a {noun}: {problem}.")
    _check_filters(name, "include", subscription.includes)
    _check_filters(name, "exclude", subscription.excludes)
    if not subscription.includes:
        raise InvalidFilter(f"Consumer {name!r} has no subject filter; use '>' for all subjects.")
    _check_limits(subscription)
    _check_deliver(name, subscription.deliver)
    _check_atomic(subscription, subscription.handler)


def _check_atomic(subscription: Subscription, handler: object) -> None:
    if subscription.atomic and inspect.iscoroutinefunction(handler):
        raise ConfigurationError(
            f"Consumer {subscription.consumer!r}: atomic=True needs a plain function, as Django's "
            "transactions do; an async handler cannot run inside one."
        )


def _check_filters(consumer: str, kind: str, patterns: tuple[str, ...]) -> None:
    limit = get_settings().FILTERS_MAX
    if len(patterns) > limit:
        raise InvalidFilter(
            f"Consumer {consumer!r} has {len(patterns)} {kind} filters, the limit is {limit} "
            "(KANTHORQ['FILTERS_MAX'])."
        )
    for pattern in patterns:
        if problem := subjects.filter_problem(pattern):
            raise InvalidFilter(
                f"Consumer {consumer!r}: the {kind} filter {str(pattern)[:80]!a} is not valid: "
                f"{problem}."
            )


def _check_limits(subscription: Subscription) -> None:
    name = subscription.consumer
    attempts = subscription.attempt_max
    if type(attempts) is not int or not 1 <= attempts <= ATTEMPT_LIMIT:
        raise ConfigurationError(
            f"Consumer {name!r}: attempt_max must be 1 to {ATTEMPT_LIMIT}, not {attempts!r}."
        )
    visibility = subscription.visibility_timeout
    if (
        not isinstance(visibility, timedelta)
        or not VISIBILITY_TIMEOUT_MIN <= visibility <= VISIBILITY_TIMEOUT_MAX
    ):
        raise ConfigurationError(
            f"Consumer {name!r}: visibility_timeout must be a timedelta from "
            f"{VISIBILITY_TIMEOUT_MIN} to {VISIBILITY_TIMEOUT_MAX}, not {visibility!r}."
        )
    _check_timeout(name, subscription.timeout)
    _check_batch(subscription)


def _check_retry(consumer: str, retry: object) -> None:
    if not isinstance(retry, RetryPolicy):
        raise ConfigurationError(
            f"Consumer {consumer!r}: retry must be a retry policy such as Fixed(), not {retry!r}."
        )


def _check_timeout(consumer: str, timeout: timedelta | None) -> None:
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise ConfigurationError(
            f"Consumer {consumer!r}: timeout must be a timedelta above zero or None, "
            f"not {timeout!r}."
        )


def _check_batch(subscription: Subscription) -> None:
    name, batch = subscription.consumer, subscription.batch
    if type(batch) is not int or not 1 <= batch <= BATCH_MAX:
        raise ConfigurationError(
            f"Consumer {name!r}: batch must be 1 to {BATCH_MAX}, not {batch!r}."
        )
    if subscription.grouped and batch == 1:
        raise ConfigurationError(
            f"Consumer {name!r}: grouped=True hands over several messages; say how many with batch."
        )
    if subscription.serialize not in (False, True, "strict"):
        raise ConfigurationError(
            f"Consumer {name!r}: serialize must be False, True or 'strict', not "
            f"{subscription.serialize!r}."
        )


def _check_deliver(consumer: str, deliver: object) -> None:
    if isinstance(deliver, datetime) and timezone.is_aware(deliver):
        return
    if deliver not in STARTS:
        raise ConfigurationError(
            f"Consumer {consumer!r}: deliver must be 'all', 'new' or an aware datetime, not "
            f"{deliver!r}."
        )
