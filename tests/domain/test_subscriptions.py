from collections.abc import Callable
from datetime import timedelta
from typing import Any

from kanthorq_django.domain.retry import Exponential, Fixed, Polynomial
from kanthorq_django.domain.subscriptions import (
    Registry,
    Subscription,
    is_coroutine,
    policy_for,
)


def subscription_of(
    handler: Callable[..., Any], consumer: str = "refunds", **given: Any
) -> Subscription:
    return Subscription(
        consumer=consumer, stream="orders", handler=handler, includes=("order.>",), **given
    )


def handle(message: object) -> None:
    """A handler of this module."""


def imported_anew(handler: Any) -> Any:
    """Return ``handler`` as a second import of its module would make it."""
    return type(handler)(handler.__code__, handler.__globals__, handler.__name__)


def test_a_subscription_is_found_by_its_consumer() -> None:
    registry, subscription = Registry(), subscription_of(handle)
    registry.add(subscription)
    assert registry.find("refunds") is subscription
    assert registry.find("nobody") is None
    assert registry.all() == [subscription]


def test_all_subscriptions_come_in_the_order_of_their_declaration() -> None:
    registry = Registry()
    for name in ("b", "a", "c"):
        registry.add(subscription_of(handle, name))
    assert [subscription.consumer for subscription in registry.all()] == ["b", "a", "c"]


def test_two_subscribers_of_one_consumer_are_noted_and_the_last_has_it() -> None:
    registry, first, second = (
        Registry(),
        subscription_of(handle),
        subscription_of(lambda message: message),
    )
    registry.add(first)
    registry.add(second)
    assert registry.duplicates == [(first, second)]
    assert registry.find("refunds") is second


def test_two_functions_of_one_name_in_one_module_are_two_subscribers() -> None:
    def twin() -> Callable[[object], None]:
        def refund(message: object) -> None: ...

        return refund

    def other_twin() -> Callable[[object], None]:
        def refund(message: object) -> None: ...

        return refund

    other = other_twin()
    other.__qualname__ = (one := twin()).__qualname__
    registry = Registry()
    registry.add(subscription_of(one))
    registry.add(subscription_of(other))
    assert len(registry.duplicates) == 1


def test_one_function_subscribed_twice_under_one_name_is_noted() -> None:
    registry = Registry()
    registry.add(subscription_of(handle, excludes=("order.a",)))
    registry.add(subscription_of(handle, excludes=("order.b",)))
    assert len(registry.duplicates) == 1


def test_a_function_that_declares_subscribers_of_one_name_is_noted() -> None:
    registry = Registry()
    for stream in ("orders", "refunds"):

        def take(message: object) -> None: ...

        registry.add(
            Subscription(consumer="taken", stream=stream, handler=take, includes=("order.>",))
        )
    assert [pair[0].stream for pair in registry.duplicates] == ["orders"]


def test_a_module_that_is_imported_anew_is_no_duplicate() -> None:
    registry = Registry()
    registry.add(subscription_of(handle))
    registry.add(subscription_of(imported_anew(handle)))
    assert registry.duplicates == []


def test_a_removed_subscription_takes_its_duplicates_along() -> None:
    registry = Registry()
    registry.add(subscription_of(handle))
    registry.add(subscription_of(lambda message: message))
    registry.remove("refunds")
    registry.remove("refunds")
    assert (registry.all(), registry.duplicates) == ([], [])


class _Made:
    """A call of this class makes an object, whatever calls of that object do."""

    async def __call__(self) -> None: ...


def test_whether_to_await_is_told_by_what_a_call_runs() -> None:
    assert is_coroutine(_Made())
    assert not is_coroutine(_Made)
    assert not is_coroutine(handle)


def test_a_place_names_module_and_function() -> None:
    assert subscription_of(handle).place == f"{__name__}.handle"
    assert "object at" in subscription_of(_Callable()).place


class _Callable:
    def __call__(self, message: object) -> None: ...


def test_a_cancellation_follows_its_own_policy_or_the_handlers() -> None:
    own = Exponential(attempt_max=3)
    assert subscription_of(handle).cancel_policy == Polynomial()
    assert subscription_of(handle, cancel_retry=own).cancel_policy is own
    assert subscription_of(handle, cancel_retry=own).cancel_attempt_max == 3
    assert subscription_of(handle, attempt_max=5).cancel_attempt_max == 5


def test_a_policy_is_found_for_handling_and_for_cancelling(declared: Registry) -> None:
    own, other = Fixed(timedelta(seconds=1)), Fixed(timedelta(seconds=2))
    declared.add(subscription_of(handle, "paid", retry=own, cancel_retry=other))
    assert policy_for("paid", is_cancellation=False) is own
    assert policy_for("paid", is_cancellation=True) is other
    assert policy_for("nobody", is_cancellation=False) == Polynomial()
