"""What code declares about cancellations, and what is refused."""

from datetime import timedelta
from typing import Any

import pytest

from kanthorq_django import Exponential, Fixed, subscribe
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.subscribers import find
from tests.test_subscribe import declare, handle

SECOND = timedelta(seconds=1)


def test_a_cancellation_handler_is_noted_and_stays_callable() -> None:
    @subscribe("order.>", consumer="repayments", retry=Fixed())
    def refund(message: Any) -> None: ...

    policy = Exponential(attempt_max=10)

    @refund.on_cancel(retry=policy, timeout=SECOND)
    def undo(message: Any) -> str:
        return "undone"

    noted = find("repayments")
    assert noted.cancel_handler is undo
    assert (noted.cancel_policy, noted.cancel_attempt_max) == (policy, 10)
    assert noted.cancel_timeout == SECOND
    assert undo(None) == "undone"


def test_a_cancellation_handler_follows_the_handlers_policy_unless_told() -> None:
    noted = declare(retry=Fixed(), attempt_max=5)
    handler: Any = noted.handler
    handler.on_cancel()(handle)
    assert (noted.cancel_handler, noted.cancel_timeout) == (handle, None)
    assert (noted.cancel_policy, noted.cancel_attempt_max) == (Fixed(), 5)


def test_a_handler_of_several_consumers_has_its_cancellations_handled_for_all() -> None:
    @subscribe("order.>", consumer="repayments")
    @subscribe("order.>", stream="archive", consumer="corrections")
    def refund(message: Any) -> None: ...

    @refund.on_cancel(timeout=SECOND)
    def undo(message: Any) -> None: ...

    for noted in (find("repayments"), find("corrections")):
        assert (noted.cancel_handler, noted.cancel_timeout) == (undo, SECOND)


def test_a_consumer_that_a_handler_gets_later_has_its_cancellations_handled_too() -> None:
    @subscribe("order.>", consumer="repayments")
    def refund(message: Any) -> None: ...

    @refund.on_cancel(retry=Fixed(), timeout=SECOND)
    def undo(message: Any) -> None: ...

    subscribe("order.>", stream="archive", consumer="corrections")(refund)
    noted = find("corrections")
    assert (noted.cancel_handler, noted.cancel_policy) == (undo, Fixed())
    assert noted.cancel_timeout == SECOND


def test_a_later_consumer_is_refused_that_its_handlers_cleanup_cannot_be_run_for() -> None:
    @subscribe("order.>", consumer="repayments")
    def refund(message: Any) -> None: ...

    @refund.on_cancel()
    async def undo(message: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="atomic=True needs a plain function"):
        subscribe("order.>", consumer="corrections", atomic=True)(refund)
    with pytest.raises(ConfigurationError, match="corrections"):
        find("corrections")


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"retry": 5}, "retry must be a retry policy"), ({"timeout": 5}, "timeout must be")],
)
def test_a_bad_option_of_a_cancellation_is_refused(options: dict[str, Any], problem: str) -> None:
    handler: Any = declare().handler
    with pytest.raises(ConfigurationError, match=problem):
        handler.on_cancel(**options)(handle)
    assert find("repayments").cancel_handler is None


def test_on_cancel_without_its_parentheses_is_refused_by_the_consumers_name() -> None:
    handler: Any = declare().handler
    with pytest.raises(ConfigurationError, match=r"'repayments': on_cancel\(\) needs its paren"):
        handler.on_cancel(handle)
    assert find("repayments").cancel_handler is None


def test_an_option_that_on_cancel_does_not_take_is_refused_by_the_handlers_name() -> None:
    handler: Any = declare().handler
    with pytest.raises(TypeError, match=r"^refund\.on_cancel\(\) got an unexpected .* 'atomic'"):
        handler.on_cancel(atomic=True)


def test_a_second_cancellation_handler_is_refused() -> None:
    noted = declare()
    handler: Any = noted.handler
    handler.on_cancel(timeout=SECOND)(handle)

    def forget(message: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"forget would replace .*handle; a handler has"):
        handler.on_cancel()(forget)
    assert (noted.cancel_handler, noted.cancel_timeout) == (handle, SECOND)
