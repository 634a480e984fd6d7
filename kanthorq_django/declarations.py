"""What the declaration of a subscriber must fulfil, told in words of the one who wrote it."""

import inspect
from datetime import datetime, timedelta

from django.utils import timezone

from kanthorq_django.conf import get_settings
from kanthorq_django.domain import subjects
from kanthorq_django.domain.moments import moment_problem
from kanthorq_django.domain.names import name_problem
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.retry import ATTEMPT_LIMIT, RetryPolicy
from kanthorq_django.domain.subscriptions import (
    ATTEMPT_MAX,
    Subscription,
    is_coroutine,
    is_generator,
    name_of,
)
from kanthorq_django.exceptions import ConfigurationError, InvalidFilter

VISIBILITY_TIMEOUT_MIN = timedelta(seconds=1)
VISIBILITY_TIMEOUT_MAX = timedelta(hours=12)
BATCH_MAX = 10_000  # messages in one call
STARTS = ("all", "new")


def check(subscription: Subscription) -> None:
    """Raise ConfigurationError naming the consumer and its first option that is wrong."""
    name, stream = subscription.consumer, subscription.stream
    if problem := name_problem(name):
        raise ConfigurationError(f"{quoted(name)} cannot name a consumer: {problem}.")
    if problem := name_problem(stream):
        raise ConfigurationError(
            f"Consumer {name!r}: {quoted(stream)} cannot name a stream: {problem}."
        )
    _check_filters(name, "include", subscription.includes)
    _check_filters(name, "exclude", subscription.excludes)
    if not subscription.includes:
        raise InvalidFilter(f"Consumer {name!r} has no subject filter; use '>' for all subjects.")
    _check_limits(subscription)
    _check_switches(subscription)
    _check_deliver(name, subscription.deliver)
    check_atomic(subscription, subscription.handler)


def check_spelling(includes: tuple[object, ...], excludes: object) -> None:
    """Refuse what Python would take for something else: a bare decorator, a str as a list."""
    if any(callable(pattern) for pattern in includes):
        raise InvalidFilter("@subscribe needs subject filters: @subscribe('order.>').")
    # No set: its order is another one in each process, and each would write the row anew.
    if not isinstance(excludes, list | tuple):
        raise InvalidFilter(f"excludes must be a list or tuple of filters, not {quoted(excludes)}.")


def check_handler(handler: object) -> None:
    """Raise ConfigurationError unless ``handler`` can be called with a message."""
    if not callable(handler):
        raise ConfigurationError(f"A handler must be callable, not {quoted(handler)}.")
    if is_generator(handler):
        raise ConfigurationError(f"{name_of(handler)} is a generator, which would never run.")
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{name_of(handler)} cannot be a handler: {error}.") from error
    try:
        signature.bind(object())
    except TypeError as error:
        raise ConfigurationError(
            f"{name_of(handler)} must take one argument, the message, but is declared with "
            f"{signature}."
        ) from error


def check_atomic(subscription: Subscription, handler: object) -> None:
    """Raise ConfigurationError for a coroutine that should run in a transaction."""
    if subscription.atomic and is_coroutine(handler):
        raise ConfigurationError(
            f"Consumer {subscription.consumer!r}: atomic=True needs a plain function, as Django's "
            "transactions do; an async handler cannot run inside one."
        )


def check_retry(consumer: str, retry: object) -> None:
    """Raise ConfigurationError unless ``retry`` is a retry policy."""
    if not isinstance(retry, RetryPolicy):
        raise ConfigurationError(
            f"Consumer {quoted(consumer)}: retry must be a retry policy such as Fixed(), "
            f"not {quoted(retry)}."
        )


def check_timeout(consumer: str, timeout: object) -> None:
    """Raise ConfigurationError unless ``timeout`` is None or a timedelta above zero."""
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise ConfigurationError(
            f"Consumer {consumer!r}: timeout must be a timedelta above zero or None, "
            f"not {quoted(timeout)}."
        )


def attempts(consumer: str, given: int | None, policy: RetryPolicy) -> int:
    """Return how many attempts there are: as given, as the policy says, else 16.

    Raises ConfigurationError when the two disagree.
    """
    if given is not None and policy.attempt_max not in (None, given):
        raise ConfigurationError(
            f"Consumer {quoted(consumer)}: attempt_max is {quoted(given)}, but its retry policy "
            f"says {policy.attempt_max}; give one."
        )
    return (policy.attempt_max or ATTEMPT_MAX) if given is None else given


def default_name(handler: object) -> str:
    """Return the name of a consumer that was given none. Raises ConfigurationError."""
    name, module = getattr(handler, "__name__", None), getattr(handler, "__module__", None)
    if name is None or module is None:
        raise ConfigurationError(f"{name_of(handler)} has no name of its own; give consumer=….")
    made = f"{module.split('.')[0]}.{name}"
    if problem := name_problem(made):
        raise ConfigurationError(
            f"{quoted(made)}, made of its package and function, cannot name a consumer: {problem}; "
            "give consumer=…."
        )
    return made


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
                f"Consumer {consumer!r}: the {kind} filter {quoted(pattern)} is not valid: "
                f"{problem}."
            )
    if problem := subjects.filters_problem(patterns):
        raise InvalidFilter(
            f"Consumer {consumer!r}: the {kind} filters are too much for PostgreSQL: {problem}."
        )


def _check_limits(subscription: Subscription) -> None:
    name = subscription.consumer
    attempts = subscription.attempt_max
    if type(attempts) is not int or not 1 <= attempts <= ATTEMPT_LIMIT:
        raise ConfigurationError(
            f"Consumer {name!r}: attempt_max must be 1 to {ATTEMPT_LIMIT}, not {quoted(attempts)}."
        )
    visibility = subscription.visibility_timeout
    if (
        not isinstance(visibility, timedelta)
        or not VISIBILITY_TIMEOUT_MIN <= visibility <= VISIBILITY_TIMEOUT_MAX
    ):
        raise ConfigurationError(
            f"Consumer {name!r}: visibility_timeout must be a timedelta from "
            f"{VISIBILITY_TIMEOUT_MIN} to {VISIBILITY_TIMEOUT_MAX}, not {quoted(visibility)}."
        )
    check_timeout(name, subscription.timeout)
    _check_batch(subscription)


def _check_batch(subscription: Subscription) -> None:
    name, batch = subscription.consumer, subscription.batch
    if type(batch) is not int or not 1 <= batch <= BATCH_MAX:
        raise ConfigurationError(
            f"Consumer {name!r}: batch must be 1 to {BATCH_MAX}, not {quoted(batch)}."
        )
    if subscription.grouped and batch == 1:
        raise ConfigurationError(
            f"Consumer {name!r}: grouped=True hands over several messages; say how many with batch."
        )
    if type(subscription.serialize) is not bool and subscription.serialize != "strict":
        raise ConfigurationError(
            f"Consumer {name!r}: serialize must be False, True or 'strict', not "
            f"{quoted(subscription.serialize)}."
        )


def _check_switches(subscription: Subscription) -> None:
    for option in ("atomic", "parked", "grouped"):
        value = getattr(subscription, option)
        if type(value) is not bool:
            raise ConfigurationError(
                f"Consumer {subscription.consumer!r}: {option} must be True or False, "
                f"not {quoted(value)}."
            )


def _check_deliver(consumer: str, deliver: object) -> None:
    if isinstance(deliver, datetime):
        if problem := moment_problem(deliver):
            raise ConfigurationError(f"Consumer {consumer!r}: deliver {problem}.")
        if timezone.is_aware(deliver):
            return
    if deliver not in STARTS:
        raise ConfigurationError(
            f"Consumer {consumer!r}: deliver must be 'all', 'new' or an aware datetime, not "
            f"{quoted(deliver)}."
        )
