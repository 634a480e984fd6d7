"""Events that everybody has dealt with, long ago."""

from datetime import timedelta

from django.db.models.functions import Now

from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task

WEEK = timedelta(days=7)


def age(days: float = 8) -> None:
    """Let everything stored so far have happened ``days`` ago."""
    ago = Now() - timedelta(days=days)
    Event._base_manager.update(created_at=ago)
    Task.objects.update(created_at=ago)
    Task.objects.final().update(finalized_at=ago)


def pull_and_ack(consumer: Consumer) -> None:
    while tasks := consumer.pull():
        for task in tasks:
            Message(task).ack()
