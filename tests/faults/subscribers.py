"""The consumers of the workload: one for each way to handle, all of them telling what they saw."""

import asyncio
import ctypes
import functools
import os
import random
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections, transaction

import kanthorq_django
from kanthorq_django import Fixed, subscribe
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.message import Message
from tests.faults.facts import COMMITTED, LOST, RAISED, RETURNED
from tests.faults.history import History
from tests.faults.workload import LEASE, STREAM
from tests.ledger.models import Entry

LONGER = 1.5  # leases that a slow handler takes
SLOW_SECONDS = float(os.environ.get("FAULTS_SLOW_SECONDS", LONGER * LEASE.total_seconds()))
SOON = Fixed(delay=timedelta(milliseconds=300))
FAILURES = 0.1  # of all attempts
MEMORY_BYTES = 64 * 2**20  # more than a worker may still take, in the test that limits it
OPTIONS: dict[str, Any] = {"stream": STREAM, "visibility_timeout": LEASE, "retry": SOON}

_opening = threading.Lock()


def history() -> History:
    """Return the one history of this process, for all of its threads."""
    with _opening:
        return _history()


@functools.cache
def _history() -> History:
    made = History(Path(os.environ["FAULTS_HISTORY"]))
    made.begin("process", code=kanthorq_django.__file__)
    return made


@contextmanager
def told(message: Message, verb: str = "handle") -> Iterator[str]:
    """Write down that a handler runs, and how that ends."""
    call = history().begin(
        verb,
        consumer=message.task.consumer.name,
        event=str(message.event.pk),
        task=message.task.pk,
        epoch=message.lease_epoch,
    )
    try:
        yield call
    except LeaseLost:
        history().note(call, outcome=LOST)
        raise
    except BaseException as error:
        history().note(call, outcome=RAISED, error=repr(error))
        raise
    else:
        history().note(call, outcome=RETURNED)


def pause(seconds: float) -> None:
    """Sleep, also under libfaketime, which breaks time.sleep()."""
    threading.Event().wait(seconds)


def text(message: Message) -> str:
    return bytes(message.event.body).decode()


def work(message: Message) -> None:
    """Take a while, and fail now and then; a replay does the same with the same event."""
    chance = random.Random(f"{message.task.consumer.name} {text(message)} {message.attempt}")  # noqa: S311  # repeatable on purpose
    pause(0.2 if chance.random() < 0.02 else chance.random() * 0.005)
    if chance.random() < FAILURES:
        raise ValueError("chance had it")


def write(message: Message, call: str, kind: str = "done") -> None:
    """Write a business row, and note its commit once there is one."""
    note = f"{kind} {message.task.consumer.name} {message.lease_epoch}"
    Entry.objects.create(event_id=message.event.pk, note=note)
    transaction.on_commit(lambda: history().note(call, outcome=COMMITTED))


@subscribe("order.>", consumer="plain", **OPTIONS)
def handle_plainly(message: Message) -> None:
    with told(message):
        work(message)


@subscribe("order.>", consumer="explicit", **OPTIONS)
def acknowledge_explicitly(message: Message) -> None:
    with told(message) as call:
        work(message)
        message.ack()
        history().note(call, outcome=COMMITTED)


@subscribe("order.>", consumer="coroutine", **OPTIONS)
async def await_something(message: Message) -> None:
    with told(message):
        await asyncio.sleep(0.005)


@subscribe("order.>", consumer="awaiting", **OPTIONS)
async def await_the_database(message: Message) -> None:
    """Use the connection that coroutines share, or one of a thread of its own."""
    is_alone = message.event.pk.int % 2 == 0
    with told(message) as call:
        await sync_to_async(end_from_a_coroutine, thread_sensitive=not is_alone)(message, call)


def end_from_a_coroutine(message: Message, call: str) -> None:
    try:
        with transaction.atomic():
            write(message, call)
            work(message)
            message.ack()
    finally:
        if message.event.pk.int % 2 == 0:
            connections.close_all()  # of a thread that nobody else looks after


@subscribe("order.>", consumer="transactional", **OPTIONS)
def acknowledge_in_a_transaction(message: Message) -> None:
    with told(message) as call, transaction.atomic():
        write(message, call)
        work(message)
        message.ack()


@subscribe("order.>", consumer="atomic", atomic=True, **OPTIONS)
def handle_atomically(message: Message) -> None:
    with told(message) as call:
        write(message, call)
        work(message)


@subscribe("order.>", consumer="batched", atomic=True, batch=5, **OPTIONS)
def handle_a_batch(messages: list[Message]) -> None:
    for message in messages:
        with told(message) as call:
            write(message, call)
    work(messages[0])


@subscribe("order.>", consumer="strict", atomic=True, serialize="strict", **OPTIONS)
def handle_in_order(message: Message) -> None:
    with told(message) as call:
        write(message, call)
        work(message)


@subscribe("order.>", consumer="cancellable", atomic=True, **OPTIONS)
def handle_unless_cancelled(message: Message) -> None:
    with told(message) as call:
        write(message, call)
        work(message)
        message.raise_if_cancelled()


@handle_unless_cancelled.on_cancel(retry=SOON)
def undo(message: Message) -> None:
    with told(message, "cancel") as call:
        write(message, call, "undone")
        work(message)


@subscribe("tick.>", consumer="ticks", atomic=True, **OPTIONS)
def count_ticks(message: Message) -> None:
    with told(message) as call:
        write(message, call)


@subscribe("gate.>", consumer="gated", atomic=True, **OPTIONS)
def wait_at_the_gate(message: Message) -> None:
    """Wait, with an uncommitted write, until the file of its lease exists in a folder."""
    with told(message) as call:
        write(message, call)
        gate = Path(text(message)) / str(message.lease_epoch)
        deadline = time.monotonic() + 60
        while not gate.exists() and time.monotonic() < deadline:
            pause(0.01)


@subscribe("linger.>", consumer="lingering", **OPTIONS)
def linger_with_an_ack(message: Message) -> None:
    """Lock its row by an ack, and take longer than a lease to commit."""
    with told(message) as call, transaction.atomic():
        write(message, call)
        message.ack()
        pause(LONGER * LEASE.total_seconds())


@subscribe("slow.>", consumer="slow", **OPTIONS)
def take_longer_than_a_lease(message: Message) -> None:
    with told(message):
        pause(SLOW_SECONDS)


@subscribe(
    "storm.>",
    consumer="stormy",
    stream=STREAM,
    visibility_timeout=timedelta(seconds=60),
    retry=Fixed(delay=timedelta(hours=1)),
)
def fail_the_first_time(message: Message) -> None:
    """Do what a handler does while what it needs is away: all of its tasks are retried."""
    with told(message):
        if message.event.subject == "storm.retried" and message.attempt == 1:
            raise ConnectionError("the service that it calls is away")


@subscribe("poison.>", consumer="poison", attempt_max=2, **OPTIONS)
def swallow_poison(message: Message) -> None:
    with told(message):
        POISONS[message.event.subject.split(".")[1]]()


def _exhaust_memory() -> None:
    used_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + MEMORY_BYTES // 2,) * 2)
    bytearray(MEMORY_BYTES)


def _hog_the_interpreter() -> None:
    # One call of C code that never lets another thread run: longer than a lease.
    re.match(r"(a|a)+$", "a" * 25 + "b")


_POOL = ThreadPoolExecutor(1)  # whose threads the interpreter waits for, daemons or not

POISONS: dict[str, Callable[[], object]] = {
    "exit": lambda: os._exit(99),
    "raise": lambda: exec("raise SystemExit(3)"),  # noqa: S102  # a handler may try to leave
    "segfault": lambda: ctypes.string_at(0),
    "memory": _exhaust_memory,
    "hog": _hog_the_interpreter,
    "pool": lambda: _POOL.submit(pause, 600),
    "thread": lambda: threading.Thread(target=pause, args=(600,), daemon=False).start(),
}
