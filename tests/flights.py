"""Handlers run as a worker runs them, step by step and in the test's own thread."""

import time
from collections.abc import Callable
from typing import Any

from asgiref.sync import async_to_sync

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task
from kanthorq_django.subscribers import find
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.endings import Ending
from kanthorq_django.worker.executor import aexecute, execute
from kanthorq_django.worker.flight import Flight


def board(task: Task, handler: Callable[[Message], Any], **options: Any) -> Flight:
    """Let ``handler`` subscribe as the task's consumer; return the flight of the task."""
    subscribe(">", consumer=task.consumer.name, **options)(handler)
    return Flight(task, find(task.consumer.name), time.monotonic())


def settle(*endings: Ending) -> None:
    """Write verdicts as the acknowledger of a worker does."""
    Acknowledger("default", written=lambda leases: None).write(list(endings))


def fly(task: Task, handler: Callable[[Message], Any], **options: Any) -> Ending:
    """Run ``handler`` and write its verdict; return it."""
    flight = board(task, handler, **options)
    flight.start()
    ending = run(flight)
    settle(ending)
    return ending


def run(flight: Flight) -> Ending:
    """Run the handler of one task; return how its lease is to end."""
    (ending,) = async_to_sync(aexecute)(flight) if flight.is_async else execute(flight)
    return ending
