"""How one worker process is to run; plain values, so that they can be handed to a child."""

import sys
from dataclasses import dataclass, field
from datetime import timedelta

from kanthorq_django.conf import CEILINGS, get_settings
from kanthorq_django.domain.amounts import counted
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.states import TaskState
from kanthorq_django.exceptions import ConfigurationError

# KanthorQ's three subscribers, and what each of them claims.
PULLERS = {
    "primary": frozenset({TaskState.AVAILABLE, TaskState.CANCELLING}),
    "retry": frozenset({TaskState.RETRYABLE}),
    "visibility": frozenset({TaskState.RUNNING, TaskState.CANCELLING}),
}
CONCURRENCY_LIMIT: int = CEILINGS["CONCURRENCY"]
BATCH_LIMIT: int = CEILINGS["BATCH_SIZE"]
DURATION_LIMIT: timedelta = CEILINGS["POLL_INTERVAL"]
_LONGEST = counted(DURATION_LIMIT.days, "day")


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What ``manage.py runworker`` takes; ``consumers`` empty means all that code declares."""

    consumers: tuple[str, ...] = ()
    concurrency: int = field(default_factory=lambda: get_settings().CONCURRENCY)
    batch_size: int = field(default_factory=lambda: get_settings().BATCH_SIZE)
    poll_interval: timedelta = field(default_factory=lambda: get_settings().POLL_INTERVAL)
    shutdown_timeout: timedelta = field(default_factory=lambda: get_settings().SHUTDOWN_TIMEOUT)
    listen: bool = field(default_factory=lambda: get_settings().LISTEN)
    burst: bool = False
    max_tasks: int | None = None
    pullers: tuple[str, ...] = tuple(PULLERS)

    def __post_init__(self) -> None:
        _check_range("concurrency", self.concurrency, CONCURRENCY_LIMIT)
        _check_range("batch_size", self.batch_size, BATCH_LIMIT)
        if self.max_tasks is not None:
            _check_range("max_tasks", self.max_tasks, sys.maxsize)
        if not timedelta(0) < self.poll_interval <= DURATION_LIMIT:
            raise ConfigurationError(
                f"poll_interval must be above zero and at most {_LONGEST}, not "
                f"{_seconds(self.poll_interval)}."
            )
        if not timedelta(0) <= self.shutdown_timeout <= DURATION_LIMIT:
            raise ConfigurationError(
                f"shutdown_timeout must be zero to {_LONGEST}, not "
                f"{_seconds(self.shutdown_timeout)}."
            )
        if not self.pullers or not set(self.pullers) <= PULLERS.keys():
            raise ConfigurationError(
                f"pullers must be some of {', '.join(PULLERS)}, "
                f"not {quoted(','.join(self.pullers))}."
            )

    @property
    def pulls(self) -> bool:
        """Whether new events are turned into tasks here."""
        return "primary" in self.pullers

    @property
    def claims(self) -> frozenset[TaskState]:
        """The states in which due tasks are claimed here."""
        return frozenset().union(*(PULLERS[name] for name in self.pullers))


def _check_range(name: str, value: int, highest: int) -> None:
    if type(value) is not int or not 1 <= value <= highest:
        limit = "at least 1" if highest == sys.maxsize else f"1 to {highest}"
        raise ConfigurationError(f"{name} must be {limit}, not {quoted(value)}.")


def _seconds(duration: timedelta) -> str:
    """Return ``duration`` as it is typed; Python tells -1 s as ``-1 day, 23:59:59``."""
    return f"{duration.total_seconds():,.10g} s"
