"""What operators see of it, and what they may do: a file per noun."""

from kanthorq_django.admin import audit, consumer, event, schedule, stream, task, worker

__all__ = ["audit", "consumer", "event", "schedule", "stream", "task", "worker"]
