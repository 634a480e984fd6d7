from datetime import timedelta
from typing import Any

import pytest
from django.core.management.base import CommandError
from django.db import connection
from django.test.utils import CaptureQueriesContext

from kanthorq_django import subscribe
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.models import Consumer, OperatorAction, TaskState
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("undeclared")]


def handle(message: Any) -> None: ...


def test_a_new_consumer_is_created():
    subscribe("order.paid", stream="orders", consumer="refunds")(handle)

    assert kanthorq("sync").words == [["created", "refunds"]]
    assert Consumer.objects.get(name="refunds").stream.name == "orders"


def test_an_unchanged_consumer_is_told_as_such():
    subscribe("order.paid", consumer="refunds")(handle)
    kanthorq("sync")

    assert kanthorq("sync").words == [["unchanged", "refunds"]]


def test_changed_filters_and_options_are_applied_and_told(undeclared: Registry):
    subscribe("order.paid", consumer="refunds")(handle)
    kanthorq("sync")
    undeclared.remove("refunds")
    subscribe(
        "order.>",
        consumer="refunds",
        attempt_max=3,
        visibility_timeout=timedelta(seconds=30),
        serialize=True,
    )(handle)

    ran = kanthorq("sync")

    assert ran.words[0] == ["changed", "refunds"]
    assert "subject_includes: ['order.paid'] -> ['order.>']" in ran.out
    assert "attempt_max: 16 -> 3" in ran.out
    assert "serialize: off -> on" in ran.out
    assert "visibility_timeout: 0:01:00 -> 0:00:30" in ran.out
    assert Consumer.objects.get(name="refunds").subject_includes == ["order.>"]


def test_only_the_named_consumers_are_registered():
    subscribe("order.paid", consumer="refunds")(handle)
    subscribe("order.paid", consumer="shipping")(handle)

    assert kanthorq("sync", "shipping").words == [["created", "shipping"]]
    assert not Consumer.objects.filter(name="refunds").exists()


def test_consumers_without_code_are_listed_as_orphaned():
    ConsumerFactory.create(name="bygone")
    TaskFactory.create(consumer__name="abandoned", state=TaskState.AVAILABLE)
    TaskFactory.create(consumer__name="forgotten", state=TaskState.PENDING)

    ran = kanthorq("sync")

    assert ran.lines == [
        "orphaned   abandoned (no code declares it; has open tasks)",
        "orphaned   bygone (no code declares it; has no open tasks)",
        "orphaned   forgotten (no code declares it; has open tasks)",
    ]
    assert "No subscriber is declared" in ran.err


def test_an_unknown_consumer_is_refused_with_near_names():
    subscribe("order.paid", consumer="refunds")(handle)

    with pytest.raises(CommandError, match="did you mean 'refunds'"):
        kanthorq("sync", "refnds")


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_a_consumer_that_moved_to_another_stream_is_refused(options: list[str]):
    ConsumerFactory.create(name="refunds", stream__name="orders", subject_includes=["order.paid"])
    subscribe("order.paid", stream="payments", consumer="refunds")(handle)

    with pytest.raises(CommandError, match="cannot move to 'payments'"):
        kanthorq("sync", *options)


def test_a_check_changes_nothing_and_tells_with_its_status(undeclared: Registry):
    subscribe("order.paid", consumer="refunds")(handle)
    assert (kanthorq("sync", "--check").status, Consumer.objects.count()) == (1, 0)
    kanthorq("sync")
    assert kanthorq("sync", "--check").status == 0
    undeclared.remove("refunds")
    subscribe("order.>", consumer="refunds")(handle)
    subscribe("order.>", consumer="shipping")(handle)
    actions = OperatorAction.objects.count()

    with CaptureQueriesContext(connection) as queries:
        ran = kanthorq("sync", "--check")

    assert all(query["sql"].startswith("SELECT") for query in queries)
    assert ran.status == 1
    assert [words for words in ran.words if words[0] == "to"] == [
        ["to", "change", "refunds"],
        ["to", "create", "shipping"],
    ]
    assert "subject_includes: ['order.paid'] -> ['order.>']" in ran.out
    assert Consumer.objects.get().subject_includes == ["order.paid"]
    assert OperatorAction.objects.count() == actions
