"""The nouns: a file each, with its columns and the verbs of its queryset.

What several of their verbs are made of stands in folders: publishing, delivery, scheduling and
maintenance.
"""

from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.audit import OperatorAction
from kanthorq_django.models.consumer import Consumer
from kanthorq_django.models.event import Event
from kanthorq_django.models.schedule import Schedule
from kanthorq_django.models.stream import Stream
from kanthorq_django.models.task import Task
from kanthorq_django.models.worker import Worker

__all__ = [
    "Consumer",
    "Event",
    "OperatorAction",
    "Schedule",
    "Stream",
    "Task",
    "TaskState",
    "Worker",
]
