"""The verbs of ``manage.py kanthorq schedules``: look at them, cancel and resume them."""

import json as jsons
from argparse import ArgumentParser
from collections.abc import Iterator
from datetime import datetime
from typing import Any, ClassVar

from django.core.management.base import CommandError
from django.utils import translation

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.amounts import counted
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.redaction import redact
from kanthorq_django.exceptions import UndecodableEvent
from kanthorq_django.management.lookup import find_schedules
from kanthorq_django.management.times import format_local
from kanthorq_django.management.verbs.verb import Verb, VerbTree
from kanthorq_django.models import Schedule
from kanthorq_django.models.isolation import together
from kanthorq_django.models.schedule import ScheduleQuerySet
from kanthorq_django.models.scheduling.definition import readable_exdates

HEADERS = ("NAME", "STATE", "NEXT", "LAST", "STREAM", "SUBJECT", "RULE")
SHOWN = 5  # next occurrences
WORDS = {"updated": "would-update", "noop": "noop"}
MOVED_FROM = {"cancel": ("active", "ended"), "resume": ("cancelled",)}


class List(Verb):
    help = "List schedules by name, with their next occurrence and their rule in words."
    description = (
        "Without names, all of them. NEXT, LAST and RULE are in the time zone of the schedule. A\n"
        "schedule is active, cancelled, or ended: its rule is over."
    )
    examples = ("schedules list", "schedules list --json | jq '.[] | {name, next_at}'")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("names", metavar="NAME", nargs="*", help="default: all")
        parser.add_argument("--json", action="store_true", help="print a JSON array")

    def run(self, *, names: list[str], json: bool, **_: Any) -> None:
        if names:
            schedules = find_schedules(names, self.database)
        else:
            stored = Schedule.objects.using(self.database).select_related("stream")
            schedules = list(stored.defer("body", "metadata").order_by("name"))
        if json:
            self.console.json([_summary(schedule) for schedule in schedules])
        else:
            self.console.table(HEADERS, list(map(_row, schedules)))


class Show(Verb):
    help = f"Show schedules with their definition and the next {SHOWN} occurrences."
    description = (
        "Occurrences are in the time zone of the schedule. Bodies may be confidential: they are\n"
        "not printed, only their size."
    )
    examples = ("schedules show weekly-report", "schedules show weekly-report --json")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("names", metavar="NAME", nargs="+")
        parser.add_argument("--json", action="store_true", help="print a JSON array")

    def run(self, *, names: list[str], json: bool, **_: Any) -> None:
        schedules = find_schedules(names, self.database)
        if json:
            self.console.json([_as_json(schedule) for schedule in schedules])
            return
        for number, schedule in enumerate(schedules):
            if number:
                self.console.line("")
            self.console.heading(schedule.name)
            for name, value in _facts(schedule):
                self.console.line(f"  {name:<14} {value}")


class Moving(Verb):
    """What the two verbs share; ``name`` is the queryset's method."""

    changes = True
    name: ClassVar[str]

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("names", metavar="NAME", nargs="*")
        parser.add_argument("--all", action="store_true", help="all of them; needs --yes")
        parser.add_argument("--dry-run", action="store_true", help="only tell what would happen")
        parser.add_argument("--yes", action="store_true", help="do not ask")
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def run(
        self,
        *,
        names: list[str],
        all: bool,  # noqa: A002  # the option's name
        dry_run: bool,
        yes: bool,
        json: bool,
        **_: Any,
    ) -> None:
        schedules = self._chosen(names, is_all=all and (yes or dry_run))
        if not (yes or dry_run):
            counts = counted(len(schedules), "schedule")
            self.console.confirm(f"{self.name.capitalize()} {counts}?")
        outcome = self._predict(schedules) if dry_run else self._move(schedules)
        words = {schedule.name: _word(outcome, schedule) for schedule in schedules}
        if json:
            told = {word: [name for name in words if words[name] == word] for word in WORDS}
            self.console.json({"verb": self.name, "dry_run": dry_run, **told})
            return
        for name, word in words.items():
            self.console.line(f"{WORDS[word] if dry_run else word:<13} {name}")
        counts = f"{len(outcome.updated):,} updated, {len(outcome.noop):,} noop."
        self.console.note(f"{'Dry run, nothing was changed: ' if dry_run else ''}{counts}")

    def move(self, schedules: ScheduleQuerySet) -> Outcome:
        """Apply the verb."""
        raise NotImplementedError

    def _chosen(self, names: list[str], *, is_all: bool) -> list[Schedule]:
        if names:
            return find_schedules(names, self.database)
        if is_all:
            return list(Schedule.objects.using(self.database).order_by("name"))
        raise CommandError("Say which schedules: give names, or --all together with --yes.")

    def _move(self, schedules: list[Schedule]) -> Outcome:
        ids = [schedule.pk for schedule in schedules]
        order = self.order(schedules=[schedule.name for schedule in schedules])
        with together(self.database):
            outcome = self.move(Schedule.objects.using(self.database).filter(pk__in=ids))
            changed = [each.name for each in schedules if each.pk in outcome.updated]
            counts = {"updated": len(changed), "noop": len(outcome.noop)}
            name = f"schedules.{self.name}"
            order.record(name, using=self.database, counts=counts, ids=changed)
        return outcome

    def _predict(self, schedules: list[Schedule]) -> Outcome:
        moved = tuple(each.pk for each in schedules if each.life in MOVED_FROM[self.name])
        return Outcome(moved, noop=tuple(each.pk for each in schedules if each.pk not in moved))


class Cancel(Moving):
    name = "cancel"
    help = "Stop schedules; events that they have published go on normally."
    description = "Prints each name as updated or noop (it was cancelled before)."
    examples = ("schedules cancel weekly-report --yes", "schedules cancel --all --dry-run")

    def move(self, schedules: ScheduleQuerySet) -> Outcome:
        return schedules.cancel()


class Resume(Moving):
    name = "resume"
    help = "Let cancelled schedules go on from now; what passed meanwhile is left out."
    description = "Prints each name as updated or noop (it was not cancelled)."
    examples = ("schedules resume weekly-report --yes",)

    def move(self, schedules: ScheduleQuerySet) -> Outcome:
        return schedules.resume()


SCHEDULES: VerbTree = {"list": List, "show": Show, "cancel": Cancel, "resume": Resume}


def _word(outcome: Outcome, schedule: Schedule) -> str:
    return "updated" if schedule.pk in outcome.updated else "noop"


def _row(schedule: Schedule) -> tuple[str, ...]:
    return (
        schedule.name,
        schedule.life,
        _told(schedule, schedule.next_at),
        _told(schedule, schedule.last_at),
        schedule.stream.name,
        schedule.subject,
        schedule.in_words(),
    )


def _told(schedule: Schedule, moment: datetime | None) -> str:
    """Return ``moment`` by the clocks that the rule goes by, beside which it stands."""
    return "-" if moment is None else format_local(schedule.local(moment))


def _facts(schedule: Schedule) -> Iterator[tuple[str, str]]:
    yield "rule", f"{schedule.in_words()} ({schedule.rrule})"
    yield "time zone", schedule.timezone
    yield "starts at", _local(schedule, schedule.dtstart)
    yield (
        "left out",
        ", ".join(_local(schedule, moment) for moment in readable_exdates(schedule)) or "-",
    )
    yield "missed ones", _missed(schedule)
    yield "state", schedule.life
    yield "last", "-" if schedule.last_at is None else _local(schedule, schedule.last_at)
    yield from (("next", _local(schedule, moment)) for moment in schedule.upcoming(SHOWN))
    yield "stream", schedule.stream.name
    yield "subject", schedule.subject
    yield "resource key", schedule.resource_key or "-"
    yield "metadata", _metadata(schedule)
    yield "body", _size_text(schedule)


def _missed(schedule: Schedule) -> str:
    """Return what becomes of missed ones, in English as all that the console tells."""
    with translation.override(None):
        return schedule.get_catchup_display()


def _metadata(schedule: Schedule) -> str:
    return redact(jsons.dumps(schedule.metadata), get_settings().REDACTED_KEYS)


def _size_bytes(schedule: Schedule) -> int | None:
    try:
        return len(schedule.body)
    except UndecodableEvent:
        return None


def _size_text(schedule: Schedule) -> str:
    size_bytes = _size_bytes(schedule)
    return "encrypted, and no key opens it" if size_bytes is None else f"{size_bytes:,} bytes"


def _local(schedule: Schedule, moment: datetime) -> str:
    return f"{schedule.local(moment):%a %Y-%m-%d %H:%M:%S %Z}"


def _summary(schedule: Schedule) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "state": schedule.life,
        "next_at": schedule.next_at,
        "last_at": schedule.last_at,
        "stream": schedule.stream.name,
        "subject": schedule.subject,
        "rrule": schedule.rrule,
        "words": schedule.in_words(),
        "timezone": schedule.timezone,
    }


def _as_json(schedule: Schedule) -> dict[str, Any]:
    return _summary(schedule) | {
        "upcoming": [schedule.local(moment) for moment in schedule.upcoming(SHOWN)],
        "dtstart": schedule.dtstart,
        "exdates": schedule.exdates,
        "catchup": schedule.catchup,
        "resource_key": schedule.resource_key,
        "metadata": jsons.loads(_metadata(schedule)),
        "body_size": _size_bytes(schedule),
        "cancelled_at": schedule.cancelled_at,
        "created_at": schedule.created_at,
    }
