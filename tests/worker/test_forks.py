"""A child that a handler forks has its connections, and is no second worker."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.db import transaction

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.worker.working import PATIENCE, announce, wait_for_state, work_off, working

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
def test_a_child_that_a_hook_of_a_transaction_forks_is_no_second_worker():
    children: list[int] = []

    def fork() -> None:
        if (child := os.fork()) != 0:
            children.append(child)

    @subscribe("work.>", stream="work", consumer="forks", atomic=True)
    def handle(message: Message) -> None:
        transaction.on_commit(fork)

    announce()
    work_off("forks", concurrency=1)
    assert status_of(*children) == 1
    assert Task.objects.completed().filter(attempt_count=1).count() == 1


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


async def in_the_thread_of_the_orm(work: Callable[[], None]) -> None:
    await sync_to_async(work)()


async def in_a_context_of_its_own(work: Callable[[], None]) -> None:
    async with ThreadSensitiveContext():
        await sync_to_async(work)()


async def in_a_thread_of_asyncio(work: Callable[[], None]) -> None:
    await asyncio.to_thread(work)


WAYS = [in_the_thread_of_the_orm, in_a_context_of_its_own, in_a_thread_of_asyncio]


@contextmanager
def working_in(
    call: Callable[..., Any], work: Callable[[], None], *, is_async: bool
) -> Iterator[None]:
    """Let a coroutine, or a plain handler with a loop of its own, do ``work`` by ``call``."""

    async def coroutine(message: Message) -> None:
        await call(work)

    def plain(message: Message) -> None:
        async_to_sync(call)(work)

    subscribe("work.>", stream="work", consumer="forks")(coroutine if is_async else plain)
    announce()
    with working("forks", concurrency=1):
        yield


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("end", [bool, go_wrong, leave])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("call", WAYS)
def test_a_child_forked_in_an_executors_thread_ends_when_its_function_does(
    call: Callable[..., Any], is_async: bool, end: Callable[[], None]
):
    children: list[int] = []

    def fork() -> None:
        if (child := os.fork()) == 0:
            end()
        else:
            children.append(child)

    with working_in(call, fork, is_async=is_async):
        wait_for_state(TaskState.COMPLETED)
        assert status_of(*children) == 1
    assert Task.objects.get().attempt_count == 1


def status_of(child: int) -> int:
    """Return the status with which a child has ended; end it if it does not."""
    found: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        found.append(os.waitstatus_to_exitcode(status))
        return pid == child

    try:
        wait_until(has_ended, 5)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return found[-1]


def compute(answer: Connection) -> None:
    own: Future[int] = Future()
    own.set_result(7)
    answer.send(own.result())


def compute_in_a_child() -> int:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=compute, args=(theirs,))
    child.start()
    child.join(PATIENCE)
    assert ours.poll()
    return int(ours.recv())


def run_a_program() -> int:
    command = [sys.executable, "-c", "exit(7)"]
    return subprocess.run(command, preexec_fn=os.setsid, check=False).returncode


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("work", [compute_in_a_child, run_a_program])
@pytest.mark.parametrize("call", WAYS)
def test_a_child_that_has_its_own_work_is_left_to_it(
    call: Callable[..., Any], work: Callable[[], int]
):
    answers: list[int] = []
    with working_in(call, lambda: answers.append(work()), is_async=True):
        wait_for_state(TaskState.COMPLETED)
    assert answers == [7]
