"""What a process remembers of the notifications that it sent."""

from kanthorq_django.models import notifications


def forget_notifications() -> None:
    """Let the next event of every stream be the first one."""
    notifications.pace.cache_clear()
    notifications.herald.cache_clear()
