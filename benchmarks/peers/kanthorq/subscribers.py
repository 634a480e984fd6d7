"""The handlers that are measured; each work has a stream of its own."""

from benchmarks.effects.models import Effect
from benchmarks.peers.board import board, stopwatch
from kanthorq_django import subscribe
from kanthorq_django.message import Message


@subscribe("noop", stream="noop", consumer="noop")
def noop(message: Message) -> None:
    board().mark(int(message.event.body))


@subscribe("insert_atomic", stream="insert_atomic", consumer="insert_atomic", atomic=True)
def insert_atomic(message: Message) -> None:
    number = int(message.event.body)
    Effect.objects.create(number=number)
    board().mark(number)


@subscribe("insert_batch", stream="insert_batch", consumer="insert_batch", atomic=True, batch=500)
def insert_batch(messages: list[Message]) -> None:
    numbers = [int(message.event.body) for message in messages]
    Effect.objects.bulk_create(Effect(number=number) for number in numbers)
    for number in numbers:
        board().mark(number)


@subscribe("ping", stream="ping", consumer="ping")
def ping(message: Message) -> None:
    stopwatch().handled(int(message.event.body))
