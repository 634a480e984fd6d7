"""``kanthorq health``: whether everything is fit to work."""

import sys
from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from kanthorq_django.management.arguments import count, duration, fraction
from kanthorq_django.management.times import format_duration
from kanthorq_django.management.verbs.verb import LOCK_TIMEOUT, Verb
from kanthorq_django.models.maintenance.health import CHECKS, Finding, Limits, Status, examine
from kanthorq_django.subscribers import find

LIMITS = Limits()
COLOURS = {Status.OK: "SUCCESS", Status.FAILED: "ERROR", Status.SKIPPED: "WARNING"}


class Health(Verb):
    """Exits with status 1 if any check failed, for probes and cron."""

    help = "Check the database, the workers and the backlog; exit with 1 if anything is wrong."
    description = f"Checks, in order: {', '.join(CHECKS)}.\nReads only, at a constant cost."
    examples = (
        "health",
        "health --json --max-lag 30s --min-workers 2",
        "health --skip workers --skip lag",
        "health refunds shipping --database orders",
    )

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "consumers",
            metavar="CONSUMER",
            nargs="*",
            help="that are at home in this database; default: all that code declares",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument(
            "--skip",
            action="append",
            choices=tuple(CHECKS),
            default=[],
            metavar="CHECK",
            help="leave a check out; repeatable",
        )
        parser.add_argument(
            "--min-workers",
            type=count(0, 100_000),
            default=LIMITS.workers,
            metavar="N",
            help="workers that must be alive; default: %(default)s",
        )
        parser.add_argument(
            "--max-notification-queue",
            type=fraction,
            default=LIMITS.queue_usage,
            metavar="SHARE",
            help="of the notification queue, from 0 to 1; default: %(default)s",
        )
        parser.add_argument(
            "--max-dead-rows",
            type=fraction,
            default=LIMITS.dead_rows,
            metavar="SHARE",
            help="of a table's rows, from 0 to 1; default: %(default)s",
        )
        _add_age(parser, "--max-pinned", LIMITS.pinned, "age of events that prune has to keep")
        _add_age(parser, "--max-lag", LIMITS.lag, "age of an unread event")
        _add_age(parser, "--max-due", LIMITS.due, "time that a due task waits")
        _add_age(parser, "--max-stuck", LIMITS.stuck, "time after the end of an unnoticed lease")
        _add_age(parser, "--max-transaction", LIMITS.transaction, "age of an open transaction")

    def run(self, *, consumers: list[str], json: bool, skip: list[str], **limits: Any) -> None:
        findings = examine(
            self.database,
            _limits(**limits),
            consumers=[find(name).consumer for name in consumers],
            skip=skip,
            lock_timeout=LOCK_TIMEOUT,
        )
        is_healthy = all(finding.status is Status.OK for finding in findings)
        if json:
            self.console.json({"healthy": is_healthy, "checks": [_as_json(f) for f in findings]})
        else:
            self._print(findings)
        if not is_healthy:
            sys.exit(1)

    def _print(self, findings: list[Finding]) -> None:
        width = max((len(finding.check) for finding in findings), default=0)
        for finding in findings:
            status = self.console.paint(COLOURS[finding.status], f"{finding.status:<7}")
            told = f"  {finding.check:<{width}}  {finding.detail}"
            self.console.line(told, painted=status)


def _add_age(parser: ArgumentParser, option: str, default: timedelta, what: str) -> None:
    parser.add_argument(
        option,
        type=duration,
        default=default,
        metavar="DURATION",
        help=f"longest {what}; default: {format_duration(default)}",
    )


def _limits(
    *,
    min_workers: int,
    max_lag: timedelta,
    max_due: timedelta,
    max_stuck: timedelta,
    max_transaction: timedelta,
    max_notification_queue: float,
    max_dead_rows: float,
    max_pinned: timedelta,
    **_: Any,
) -> Limits:
    return Limits(
        workers=min_workers,
        lag=max_lag,
        due=max_due,
        stuck=max_stuck,
        transaction=max_transaction,
        queue_usage=max_notification_queue,
        dead_rows=max_dead_rows,
        pinned=max_pinned,
    )


def _as_json(finding: Finding) -> dict[str, str]:
    return {"name": finding.check, "status": finding.status, "detail": finding.detail}
