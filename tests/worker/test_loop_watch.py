"""A coroutine that keeps the event loop to itself is named, once."""

import asyncio
import threading

import pytest

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import TaskState
from kanthorq_django.worker.lanes import loop_watch
from tests.concurrency import wait_until
from tests.worker.working import PATIENCE, announce, wait_for_state, working

pytestmark = pytest.mark.django_db(transaction=True)

TOLD = "blocks the event loop, so all coroutines of this process wait for it"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_watch, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(loop_watch, "BLOCKED_AFTER", 0.3)


def is_told(caplog: pytest.LogCaptureFixture) -> bool:
    return TOLD in caplog.text


def test_a_handler_that_blocks_the_event_loop_is_named_once(caplog: pytest.LogCaptureFixture):
    @subscribe("work.>", stream="work", consumer="blocks")
    async def handle(message: Message) -> None:
        wait_until(lambda: is_told(caplog), PATIENCE)
        threading.Event().wait(0.6)  # it would be told of again

    announce(2)
    with working("blocks"):
        wait_for_state(TaskState.COMPLETED, 2)
    (record,) = [each for each in caplog.records if TOLD in each.message]
    first, where, *_ = record.message.splitlines()
    assert "handle blocks" in first
    assert ", in handle" in where


def test_a_task_of_a_handler_that_blocks_the_event_loop_is_named(caplog: pytest.LogCaptureFixture):
    async def block() -> None:
        wait_until(lambda: is_told(caplog), PATIENCE)

    @subscribe("work.>", stream="work", consumer="blocks")
    async def handle(message: Message) -> None:
        await asyncio.gather(block(), asyncio.sleep(0))

    announce()
    with working("blocks"):
        wait_for_state(TaskState.COMPLETED)
    assert f"{block.__qualname__} blocks" in caplog.text


def test_handlers_that_await_are_not_told_of(caplog: pytest.LogCaptureFixture):
    @subscribe("work.>", stream="work", consumer="awaits")
    async def handle(message: Message) -> None:
        await asyncio.sleep(1)  # in which one that blocks would be told of three times

    announce()
    with working("awaits"):
        wait_for_state(TaskState.COMPLETED)
    assert not is_told(caplog)
