"""What worker processes in tests run; each consumer shows one way of handling."""

import asyncio
import os
import time
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from asgiref.sync import sync_to_async
from django.db import connection, transaction

from kanthorq_django import Exponential, Fixed, subscribe
from kanthorq_django.message import Message
from tests.ledger.models import Entry

SHORT = timedelta(seconds=2)  # a lease that ends within a test
GATE = 20_107  # the advisory lock that a test holds to keep handlers waiting


@subscribe("entry.>", stream="ledger", consumer="atomic", atomic=True, visibility_timeout=SHORT)
def write_atomically(message: Message) -> None:
    """Exactly-once effects by one keyword."""
    Entry.objects.create(event_id=message.event.pk, note="atomic")


@subscribe("entry.>", stream="ledger", consumer="transactional", visibility_timeout=SHORT)
def write_with_ack(message: Message) -> None:
    """Exactly-once effects by an explicit ack inside a block."""
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk, note="transactional")
        message.ack()


@subscribe(
    "flaky.>",
    stream="ledger",
    consumer="flaky",
    attempt_max=3,
    retry=Fixed(delay=timedelta(milliseconds=100)),
    visibility_timeout=SHORT,
)
def fail_twice(message: Message) -> UUID:
    """Succeeds with its third attempt."""
    if message.attempt < 3:
        raise ValueError(f"attempt {message.attempt} fails")
    return message.event.pk


@subscribe("async.>", stream="ledger", consumer="async", visibility_timeout=SHORT)
async def wait_a_while(message: Message) -> int:
    """Many of these run at the same time on one loop."""
    await asyncio.sleep(0.2)
    return message.attempt


def pass_gate() -> None:
    """Wait, inside the database, until no test holds the gate."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock_shared(%s)", [GATE])


@subscribe(
    "gate.>", stream="ledger", consumer="gated-atomic", atomic=True, visibility_timeout=SHORT
)
def write_behind_the_gate(message: Message) -> None:
    """Waits with a write that has not been committed."""
    Entry.objects.create(event_id=message.event.pk, note="gated-atomic")
    pass_gate()


@subscribe("gate.>", stream="ledger", consumer="gated-ack", visibility_timeout=SHORT)
def ack_behind_the_gate(message: Message) -> None:
    """Waits with a write that has not been committed, before its explicit ack."""
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk, note="gated-ack")
        pass_gate()
        message.ack()


@subscribe("gate.>", stream="ledger", consumer="acked-gate", visibility_timeout=SHORT)
def wait_behind_the_gate_with_an_ack(message: Message) -> None:
    """Waits with a write and an ack that have not been committed."""
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk, note="acked-gate")
        message.ack()
        pass_gate()


@subscribe("gate.>", stream="ledger", consumer="gated-plain", visibility_timeout=SHORT)
def write_after_the_gate(message: Message) -> str:
    """Writes without a transaction: at least once."""
    pass_gate()
    Entry.objects.create(event_id=message.event.pk, note="gated-plain")
    return f"attempt {message.attempt}"


@subscribe("gated.>", stream="ledger", consumer="gated", visibility_timeout=SHORT)
def wait_at_the_gate(message: Message) -> int:
    """Waits until the file exists that the body names as its gate."""
    Entry.objects.create(event_id=message.event.pk, note="started")
    if gate := message.event.json()["gate"]:
        deadline = time.monotonic() + 60
        while not Path(gate).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    return os.getpid()


@subscribe("hung.>", stream="ledger", consumer="hung", visibility_timeout=SHORT)
async def hang(message: Message) -> None:
    """Hangs in a thread that the interpreter would wait for."""
    await Entry.objects.acreate(event_id=message.event.pk, note="started")
    await sync_to_async(time.sleep)(60)


@subscribe(
    "poison.>", stream="ledger", consumer="poison", attempt_max=2, visibility_timeout=SHORT / 2
)
def kill_the_process(message: Message) -> None:
    """A poison message: no handler, no interpreter, nobody who could nack it."""
    os._exit(99)


@subscribe("export.>", stream="ledger", consumer="export", visibility_timeout=SHORT)
def export(message: Message) -> None:
    """Writes one file after the other into the folder that the body names, until it is stopped."""
    folder = Path(message.event.json()["folder"])
    for number in range(3_000):
        message.raise_if_cancelled()
        (folder / f"part-{number}").write_text("some rows")
        time.sleep(0.02)


@export.on_cancel(retry=Exponential(attempt_max=10, base=SHORT / 20, longest=SHORT))
def remove_files(message: Message) -> None:
    """Removes them, though not before its third attempt."""
    if message.attempt < 3:
        raise OSError(f"the disk is busy ({message.attempt})")
    for path in Path(message.event.json()["folder"]).iterdir():
        path.unlink()
