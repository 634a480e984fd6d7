"""What worker processes in tests run; each consumer shows one way of handling."""

import asyncio
from datetime import timedelta
from uuid import UUID

from django.db import transaction

from kanthorq_django import Fixed, subscribe
from kanthorq_django.message import Message
from tests.ledger.models import Entry

SHORT = timedelta(seconds=2)  # a lease that ends within a test


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
