"""``@subscribe``: what code declares in ``<app>/subscribers.py``, and what is made of it.

Nothing here touches the database until ``sync()``, so it can be imported at any time.
"""

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

from django.db import router

from kanthorq_django import declarations
from kanthorq_django.domain.names import near_names
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.retry import Polynomial, RetryPolicy
from kanthorq_django.domain.subscriptions import (
    VISIBILITY_TIMEOUT,
    Subscription,
    name_of,
    registry,
)
from kanthorq_django.exceptions import ConfigurationError

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer
    from kanthorq_django.models.registration import Registration

__all__ = ["Subscriber", "registry", "subscribe", "sync"]

# What a handler takes, a message or a list of them, and what it returns.
M = TypeVar("M")
R = TypeVar("R")
M_contra = TypeVar("M_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
C = TypeVar("C", bound=Callable[..., Any])


class Subscriber(Protocol[M_contra, R_co]):
    """A handler as ``@subscribe`` leaves it: the same callable, with one attribute more.

    An object that has no name gets that of its class.
    """

    __name__: str

    def __call__(self, message: M_contra, /) -> R_co: ...

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
    excludes: list[str] | tuple[str, ...] = (),
    attempt_max: int | None = None,
    visibility_timeout: timedelta = VISIBILITY_TIMEOUT,
    timeout: timedelta | None = None,
    retry: RetryPolicy | None = None,
    atomic: bool = False,
    deliver: str | datetime = "all",
    parked: bool = False,
    serialize: bool | Literal["strict"] = False,
    batch: int = 1,
    grouped: bool = False,
) -> Callable[[Callable[[M], R]], Subscriber[M, R]]:
    """Let the decorated function handle each event of ``stream`` that ``includes`` select.

    It is called with a ``Message`` and stays a plain callable; it may be ``async def``.
    ``consumer`` defaults to ``<top-level package>.<function>``. ``atomic`` runs it and its
    acknowledgement in one transaction: exactly-once effects. ``deliver`` says where a new
    consumer starts: ``"all"``, ``"new"`` or an aware datetime. ``attempt_max`` defaults to the
    retry policy's, else 16; ``visibility_timeout`` to a minute. ``serialize`` runs tasks with
    the same resource key one at a time: True lets later ones pass a task that waits for its
    retry, ``"strict"`` does not. With ``batch`` above 1 the function is called with a list of
    at most that many messages; ``grouped`` gives it those of one resource key, in the order of
    publishing.

    Raises ConfigurationError naming what is wrong.
    """
    policy = Polynomial() if retry is None else retry
    declarations.check_spelling(includes, excludes)

    def register(handler: Callable[[M], R]) -> Subscriber[M, R]:
        declarations.check_handler(handler)
        name = declarations.default_name(handler) if consumer is None else consumer
        declarations.check_retry(name, policy)
        subscription = Subscription(
            consumer=name,
            stream=stream,
            handler=handler,
            includes=tuple(includes),
            excludes=tuple(excludes),
            attempt_max=declarations.attempts(name, attempt_max, policy),
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
        declarations.check(subscription)
        _clean_up_as_others(subscription)
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
    from kanthorq_django.models import Consumer

    alias = using or router.db_for_write(Consumer)
    return [
        Consumer.objects.using(alias).register(subscription.consumer, _registration(subscription))
        for subscription in _chosen(consumers)
    ]


def declared(consumer: str) -> "Consumer":
    """Return the row that code declares for ``consumer``, unsaved. Raises as ``find()`` does."""
    from kanthorq_django.models import Consumer
    from kanthorq_django.models.registration import DECLARED

    given = _registration(find(consumer))._asdict()
    # A registration names the filters without the prefix that their columns have.
    columns = {column: given[column.removeprefix("subject_")] for column in DECLARED}
    filters = {column: list(columns[column]) for column in ("subject_includes", "subject_excludes")}
    return Consumer(name=consumer, **columns | filters)


def find(consumer: str) -> Subscription:
    """Return the subscription of ``consumer``.

    Raises ConfigurationError, with near or known names, when no code declares it.
    """
    if subscription := registry.find(consumer):
        return subscription
    known = [subscription.consumer for subscription in registry.all()]
    raise ConfigurationError(
        f"No subscriber declares the consumer {quoted(consumer)}; {near_names(consumer, known)}"
    )


def _with_on_cancel(handler: Callable[[M], R], subscription: Subscription) -> Subscriber[M, R]:
    def on_cancel(
        *bare: object, retry: RetryPolicy | None = None, timeout: timedelta | None = None
    ) -> Callable[[C], C]:
        if bare:
            raise ConfigurationError(
                f"Consumer {subscription.consumer!r}: on_cancel() needs its parentheses, and takes "
                "options by name alone, such as @refund.on_cancel(retry=Fixed())."
            )

        def register(cancel_handler: C) -> C:
            _note_cancel_handler(subscription, cancel_handler, retry, timeout)
            return cancel_handler

        return register

    try:
        if not hasattr(handler, "__name__"):
            handler.__name__ = type(handler).__name__
        handler.on_cancel = on_cancel  # type: ignore[attr-defined]  # functions take attributes
    except (AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"{name_of(handler)} cannot be a handler, as it takes no attribute; use a function."
        ) from error
    on_cancel.__qualname__ = f"{handler.__name__}.on_cancel"  # for errors of a wrong call
    return cast("Subscriber[M, R]", handler)


def _note_cancel_handler(
    subscription: Subscription,
    cancel_handler: Callable[..., Any],
    retry: RetryPolicy | None,
    timeout: timedelta | None,
) -> None:
    """Keep a cancellation handler, for all consumers of the handler that it belongs to."""
    declarations.check_handler(cancel_handler)
    declarations.check_timeout(subscription.consumer, timeout)
    if retry is not None:
        declarations.check_retry(subscription.consumer, retry)
    others = [each for each in registry.all() if each.handler is subscription.handler]
    for each in (subscription, *others):
        declarations.check_atomic(each, cancel_handler)
        if each.cancel_handler not in (None, cancel_handler):
            raise ConfigurationError(
                f"Consumer {each.consumer!r}: {name_of(cancel_handler)} would replace "
                f"{name_of(each.cancel_handler)}; a handler has one on_cancel()."
            )
    for each in (subscription, *others):
        each.cancel_handler = cancel_handler
        each.cancel_retry, each.cancel_timeout = retry, timeout


def _clean_up_as_others(subscription: Subscription) -> None:
    """Give a new consumer the cancellation handler that its handler has from other ones."""
    for other in registry.all():
        if other.handler is subscription.handler and other.cancel_handler is not None:
            known = other.cancel_handler, other.cancel_retry, other.cancel_timeout
            _note_cancel_handler(subscription, *known)
            return


def _chosen(consumers: Iterable[str] | None) -> list[Subscription]:
    if consumers is None:
        return registry.all()
    return [find(consumer) for consumer in dict.fromkeys(consumers)]


def _registration(subscription: Subscription) -> "Registration":
    from kanthorq_django.models.registration import Registration

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
    from kanthorq_django.models.delivery.turns import Serialize

    if subscription.serialize == "strict":
        return str(Serialize.STRICT.value)
    # A group is all of one key, so two groups of a key never run side by side.
    is_on = subscription.serialize or subscription.grouped
    return str(Serialize.ON.value if is_on else Serialize.OFF.value)
