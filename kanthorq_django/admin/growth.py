"""What grows without a bound, told on the first page that an operator looks at."""

from collections.abc import Iterable
from datetime import timedelta

from kanthorq_django.models.maintenance.health import (
    CHECKS,
    GROWTH,
    Finding,
    Limits,
    Status,
    examine,
    pinned,
)


def growing(using: str, ages: Iterable[tuple[str, timedelta | None]]) -> list[Finding]:
    """Return the findings that want a look, in two statements.

    ``ages`` are those of the oldest unread event of the consumers on the page, by their names.
    """
    findings = examine(using, skip=CHECKS.keys() - GROWTH | {"pinned"})
    told = [finding for finding in findings if finding.status is Status.FAILED]
    is_ok, detail = pinned(ages, Limits().pinned)
    return told if is_ok else [*told, Finding("pinned", Status.FAILED, detail)]
