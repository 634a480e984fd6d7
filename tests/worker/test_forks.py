"""A child that a handler forks has its connections, and is no second worker."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task
from tests.ledger.models import Entry
from tests.worker.working import (
    announce,
    work_off,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_a_handler_forks_is_no_second_worker():
    statuses: list[int] = []

    @subscribe("work.>", stream="work", consumer="forks")
    def handle(message: Message) -> None:
        child = os.fork()
        if child == 0:
            raise ValueError("in the child")
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    announce(3)
    work_off("forks", concurrency=1)
    assert statuses == [1, 1, 1]
    assert Task.objects.completed().filter(attempt_count=1).count() == 3


def leave() -> None:
    sys.exit(0)


def go_wrong() -> None:
    raise ValueError("in the child")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("end", [leave, go_wrong, bool])
@pytest.mark.parametrize("group_size", [1, 20])
def test_a_child_that_a_handler_forks_ends_nothing_of_its_parents_transaction(
    group_size: int, end: Callable[[], None], settings: Any
):
    """It has the same connection to the server, which cannot tell who says ROLLBACK or COMMIT."""
    settings.KANTHORQ = {"GROUP_COMMIT": group_size}

    @subscribe("work.>", stream="work", consumer="forks", atomic=True)
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)
        if message.event.json() % 20 != 1:
            return
        child = os.fork()
        if child == 0:
            end()
        else:
            os.waitpid(child, 0)

    announce(60)
    work_off("forks", concurrency=1)
    assert Task.objects.completed().filter(attempt_count=1).count() == 60
    assert Entry.objects.count() == 60


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_a_coroutine_forks_is_no_second_worker():
    statuses: list[int] = []

    @subscribe("work.>", stream="work", consumer="forks")
    async def handle(message: Message) -> None:
        if (child := os.fork()) == 0:
            sys.exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    announce(3)
    work_off("forks", concurrency=1)
    assert statuses == [1, 1, 1]
    assert Task.objects.completed().filter(attempt_count=1).count() == 3
