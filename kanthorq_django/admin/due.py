"""What ``schedule_at`` means in each state, by the database's clock."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from django.db.models import BooleanField, ExpressionWrapper, Q, QuerySet
from django.db.models.functions import Now
from django.utils.html import format_html
from django.utils.translation import gettext

from kanthorq_django.admin.display import state_badge
from kanthorq_django.domain.states import FINAL, TaskState


def with_is_due(tasks: QuerySet[Any]) -> QuerySet[Any]:
    """Let each task tell ``is_due``: whether its ``schedule_at`` has passed."""
    is_due = ExpressionWrapper(Q(schedule_at__lte=Now()), output_field=BooleanField())
    annotated: QuerySet[Any] = tasks.annotate(is_due=is_due)
    return annotated


def task_badge(task: Any) -> str:
    """Return the badge of a task of ``with_is_due()``; it tells running tasks from one another."""
    is_running = task.state == TaskState.RUNNING
    return state_badge(
        task.state,
        is_stuck=is_running and task.is_due,
        is_asked=is_running and task.cancel_requested_at is not None,
    )


def due_text(task: Any, show: Callable[[datetime | None], str]) -> str:
    """Say when a task of ``with_is_due()`` may be claimed, or, of a final one, when it ended."""
    if task.state in FINAL:
        return format_html(gettext("ended {}"), show(task.finalized_at))
    if task.state == TaskState.PENDING:
        return gettext("once released")
    text = gettext("due {}")
    if task.state == TaskState.RUNNING:
        text = gettext("lease ran out {}") if task.is_due else gettext("lease ends {}")
    return format_html(text, show(task.schedule_at))
