"""The handlers that are measured; each work has a stream of its own."""

import os
import time

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


@subscribe("serialized", stream="serialized", consumer="serialized", serialize=True)
def serialized(message: Message) -> None:
    board().mark(int(message.event.body))


@subscribe("rare", stream="rare", consumer="rare")
def rare(message: Message) -> None:
    board().mark(int(message.event.body))


@subscribe("cancellable", stream="cancellable", consumer="cancellable")
def cancellable(message: Message) -> None:
    number = int(message.event.body)
    stopwatch().published(number)  # it runs; the stamp itself is put by who cancels it
    while not message.cancelled:
        time.sleep(0.0005)
    stopwatch().handled(number)


def quiet(message: Message) -> None:
    """Never called: nobody publishes for these consumers."""


for _number in range(int(os.environ.get("BENCH_QUIET_CONSUMERS", "0"))):
    subscribe(f"quiet{_number}", stream=f"quiet{_number}", consumer=f"quiet{_number}")(quiet)
