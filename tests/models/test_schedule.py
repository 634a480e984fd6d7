import threading
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import (
    DatabaseError,
    IntegrityError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.models import F
from django.utils import timezone

from kanthorq_django import schedule, signals
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.exceptions import (
    IdempotencyConflict,
    InvalidBody,
    InvalidSchedule,
    InvalidSubject,
)
from kanthorq_django.models import Event, Schedule, Stream
from kanthorq_django.models.isolation import brief, patient
from kanthorq_django.models.scheduling.occurrences import TURN_SIZE, Unpublished
from kanthorq_django.worker.scheduler import LOOK_EVERY, Scheduler
from tests.concurrency import elsewhere
from tests.errors import Abort
from tests.receivers import heard_by

DAY = timedelta(days=1)


def daily(**given: Any) -> Schedule:
    options: dict[str, Any] = {
        "rrule": "FREQ=DAILY",
        "dtstart": timezone.now().replace(microsecond=0) + timedelta(hours=1),
        "subject": "report.due",
        "stream": "reports",
    }
    return schedule("report", **(options | given))


def pass_time(kept: Schedule, span: timedelta) -> None:
    """Let the schedule believe that it was made ``span`` ago and nobody looked since."""
    Schedule.objects.filter(pk=kept.pk).update(
        dtstart=kept.dtstart - span, next_at=kept.next_at - span if kept.next_at else None
    )


def known(moment: datetime | None) -> datetime:
    assert moment is not None
    return moment


@pytest.mark.django_db
def test_a_due_occurrence_publishes_one_event_and_steps_on():
    kept = daily(body={"kind": "daily"}, resource_key="r", metadata={"by": "test"})
    assert Schedule.objects.publish_due() == 0
    pass_time(kept, timedelta(hours=1))

    assert Schedule.objects.publish_due() == 1
    assert Schedule.objects.publish_due() == 0
    event = Event.objects.get()
    kept.refresh_from_db()
    assert event.subject == "report.due"
    assert event.json() == {"kind": "daily"}
    assert event.resource_key == "r"
    assert event.metadata["by"] == "test"
    assert event.metadata["schedule"] == "report"
    assert event.metadata["occurrence"] == known(kept.last_at).isoformat()
    assert kept.next_at == known(kept.last_at) + DAY


@pytest.mark.django_db
@pytest.mark.parametrize(("catchup", "published"), [("all", 4), ("last", 1), ("none", 0)])
def test_missed_occurrences_are_caught_up_as_asked(catchup: str, published: int):
    kept = daily(catchup=catchup)
    pass_time(kept, 3 * DAY + timedelta(hours=2))

    assert Schedule.objects.publish_due() == published
    assert Schedule.objects.publish_due() == 0
    kept.refresh_from_db()
    assert timezone.now() < known(kept.next_at) <= timezone.now() + DAY


@pytest.mark.django_db
def test_a_long_backlog_is_caught_up_in_bounded_turns():
    kept = daily(rrule="FREQ=MINUTELY", catchup="all")
    pass_time(kept, timedelta(hours=1, minutes=250))

    turns = []
    while published := Schedule.objects.publish_due():
        turns.append(published)
    assert turns == [100, 100, 51]
    assert Event.objects.count() == 251


def due_at_once(count: int, **given: Any) -> None:
    for number in range(count):
        start = timezone.now() + timedelta(hours=1)
        kept = schedule(
            f"report-{number:02}", dtstart=start, subject="report.due", stream="reports",
            **({"rrule": "FREQ=DAILY"} | given),
        )  # fmt: skip
        pass_time(kept, timedelta(hours=4))


@pytest.mark.django_db
def test_one_call_publishes_what_is_due_of_however_many_schedules():
    due_at_once(25)
    assert Schedule.objects.publish_due() == 25


@pytest.mark.django_db
def test_a_long_backlog_of_each_of_many_schedules_is_caught_up_in_bounded_turns():
    due_at_once(25, rrule="FREQ=MINUTELY", catchup="all")
    assert Schedule.objects.publish_due() == 25 * 100


@pytest.mark.django_db
@pytest.mark.parametrize("names", [(), ("report-03", "report-07")])
def test_a_worker_goes_back_to_its_tasks_after_some_schedules(names: Collection[str]):
    def hear(events: list[Event], **_: Any) -> None:
        if events[0].metadata["schedule"] in names:
            raise ValueError

    due_at_once(3 * TURN_SIZE)
    scheduler = Scheduler("default")
    refused = pytest.raises(ExceptionGroup) if names else nullcontext()
    with heard_by(hear, signals.published), refused:
        scheduler.turn()
    assert TURN_SIZE <= Event.objects.count() < 2 * TURN_SIZE
    assert scheduler.seconds == 0


@pytest.mark.django_db
def test_a_rule_ends_after_its_count():
    kept = daily(rrule="FREQ=DAILY;COUNT=2", catchup="all")
    pass_time(kept, 10 * DAY)

    assert Schedule.objects.publish_due() == 2
    kept.refresh_from_db()
    assert kept.next_at is None
    assert kept.upcoming() == []


@pytest.mark.django_db
def test_cancel_stops_further_occurrences_and_resume_goes_on_from_now():
    kept = daily(catchup="all")
    assert Schedule.objects.filter(name="report").cancel() == Outcome(updated=(kept.pk,))
    assert Schedule.objects.filter(name="report").cancel() == Outcome(noop=(kept.pk,))
    pass_time(kept, 3 * DAY)
    assert Schedule.objects.publish_due() == 0

    assert Schedule.objects.filter(name="report").resume() == Outcome(updated=(kept.pk,))
    assert Schedule.objects.publish_due() == 0
    kept.refresh_from_db()
    assert known(kept.next_at) > timezone.now()


@pytest.mark.django_db
def test_cancelling_leaves_published_events_alone():
    kept = daily()
    pass_time(kept, timedelta(hours=1))
    Schedule.objects.publish_due()
    Schedule.objects.all().cancel()
    assert Event.objects.count() == 1


@pytest.mark.django_db
def test_declaring_again_changes_what_changed_and_keeps_a_cancelled_one_cancelled():
    first = daily(dtstart=datetime(2026, 1, 1, 9, tzinfo=UTC))
    again = daily(dtstart=datetime(2026, 1, 1, 9, tzinfo=UTC))
    assert (again.pk, again.next_at) == (first.pk, first.next_at)

    Schedule.objects.all().cancel()
    changed = daily(dtstart=datetime(2026, 1, 1, 9, tzinfo=UTC), rrule="FREQ=WEEKLY;BYDAY=MO")
    assert changed.pk == first.pk
    assert changed.rrule == "FREQ=WEEKLY;BYDAY=MO"
    assert changed.cancelled_at is not None
    assert Schedule.objects.publish_due() == 0


@pytest.mark.django_db
def test_occurrences_before_the_declaration_are_not_missed():
    kept = daily(dtstart=timezone.now() - 30 * DAY, catchup="all")
    assert known(kept.next_at) > timezone.now()
    assert Schedule.objects.publish_due() == 0


@pytest.mark.django_db
def test_the_next_five_are_told():
    kept = daily()
    assert kept.upcoming() == [known(kept.next_at) + number * DAY for number in range(5)]
    assert kept.in_words().startswith("every day at ")


@pytest.mark.django_db
@pytest.mark.parametrize("count", [-1, 1.5, True, None, "5"])
def test_occurrences_are_counted_from_none_on(count: Any):
    kept = daily()
    with pytest.raises(ValueError, match=f"count must be 0 or more, not {count!r}"):
        kept.upcoming(count)
    kept.cancelled_at = kept.created_at
    with pytest.raises(ValueError, match="count must be"):
        kept.upcoming(count)
    assert kept.upcoming(0) == []


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("wrong", "error", "word"),
    [
        ({"rrule": "FREQ=DAILY;INTERVAL=0"}, InvalidSchedule, "INTERVAL"),
        ({"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"}, InvalidSchedule, "never occurs"),
        ({"dtstart": datetime(2026, 1, 1)}, InvalidSchedule, "aware"),  # noqa: DTZ001
        ({"dtstart": "2026-01-01"}, InvalidSchedule, "aware"),
        ({"timezone": "Mars/Olympus"}, InvalidSchedule, "time zone"),
        ({"timezone": "../etc/passwd"}, InvalidSchedule, "time zone"),
        ({"exdates": datetime(2026, 1, 1, tzinfo=UTC)}, InvalidSchedule, "takes a list of aware"),
        ({"exdates": [datetime(2026, 1, 1)]}, InvalidSchedule, "aware"),  # noqa: DTZ001
        ({"catchup": "some"}, InvalidSchedule, "catchup"),
        ({"subject": "report.*"}, InvalidSubject, "wildcard"),
        ({"body": {"a": float("nan")}}, InvalidBody, "NaN|nan"),
    ],
)
def test_a_wrong_definition_is_refused_and_nothing_is_written(wrong, error, word):
    with pytest.raises(error, match=word):
        daily(**wrong)
    assert not Schedule.objects.exists()
    assert connection.is_usable()


@pytest.mark.django_db
def test_a_definition_that_became_impossible_stops_alone():
    kept = daily()
    other = schedule(
        "other", rrule="FREQ=DAILY", dtstart=kept.dtstart, subject="report.other", stream="reports"
    )
    for each in (kept, other):
        pass_time(each, timedelta(hours=1))
    Schedule.objects.filter(pk=kept.pk).update(timezone="Gone/Zone")

    assert Schedule.objects.publish_due() == 1
    kept.refresh_from_db()
    assert kept.cancelled_at is not None
    assert Event.objects.get().subject == "report.other"


@pytest.mark.django_db(transaction=True)
def test_who_publishes_what_is_due_locks_no_stream():
    due_at_once(1)
    with transaction.atomic():
        assert list(Stream.objects.select_for_update(no_key=True))
        assert elsewhere(Schedule.objects.publish_due) == 1


@pytest.mark.django_db(transaction=True)
def test_an_interrupt_of_the_main_thread_is_no_fault_of_a_schedule():
    due_at_once(1)

    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    signals.published.connect(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            Schedule.objects.publish_due()
    finally:
        signals.published.disconnect(interrupt)
    assert not Event.objects.exists()


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def swallow() -> None:
    """Break the transaction, and hide it."""
    with suppress(DatabaseError), connection.cursor() as cursor:
        cursor.execute("SELECT 1/0")


@pytest.mark.django_db
@pytest.mark.parametrize(
    "fail",
    [
        *map(raising, (ValueError("no"), SystemExit("no"), Abort("no"), IntegrityError("no"))),
        raising(OperationalError("another database is away")),
        raising(IdempotencyConflict("of what the receiver publishes")),
        swallow,
    ],
)
def test_a_receiver_that_fails_keeps_only_its_schedule_from_publishing(
    monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]
):
    """Also where the first to come, as many as have their turn together, fail each time."""
    monkeypatch.setattr("kanthorq_django.models.scheduling.occurrences.TURN_SIZE", 2)
    first = timezone.now().replace(microsecond=0) + timedelta(hours=1)
    for index, name in enumerate(["bad-1", "bad-2", "bad-3", *(f"good-{n}" for n in range(9))]):
        when = first + timedelta(seconds=index)
        kept = schedule(name, rrule="FREQ=DAILY", dtstart=when, subject=name, stream="reports")
        pass_time(kept, timedelta(hours=2))

    def hear(events: list[Event], **_: Any) -> None:
        if events[0].subject.startswith("bad"):
            fail()

    with heard_by(hear, signals.published):
        for _ in range(2):
            with pytest.raises(ExceptionGroup, match="could not publish") as told:
                Schedule.objects.publish_due()
            names = [str(each).partition(":")[0] for each in told.value.exceptions]
            assert names == ["bad-1", "bad-2", "bad-3"]
            assert told.value.exceptions[0].__cause__ is not None
            assert Event.objects.count() == 9
    assert Schedule.objects.publish_due() == 3
    assert Event.objects.count() == 12


@pytest.mark.django_db(transaction=True)
def test_a_receiver_may_take_longer_than_a_client_that_has_gone():
    pass_time(daily(), timedelta(days=1))
    seen: list[str] = []

    def hear(**_: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SHOW idle_in_transaction_session_timeout")
            seen.append(cursor.fetchone()[0])

    with heard_by(hear, signals.published):
        assert Schedule.objects.publish_due() == 1
    assert seen == ["0"]


def test_each_schedule_that_fails_is_named_once_in_the_log(caplog: pytest.LogCaptureFixture):
    scheduler, told = Scheduler("default"), []
    for turn, names in enumerate((["a"], ["a", "b"], ["a", "b"])):
        failures = [Unpublished(name, f"request {turn} was refused") for name in names]
        scheduler.postpone(ExceptionGroup("no", failures))
        told.append([text for text in caplog.messages if "A schedule could" in text])
        caplog.clear()
    assert told == [
        ["A schedule could not publish; a: request 0 was refused"],
        ["A schedule could not publish; b: request 1 was refused"],
        [],
    ]


@pytest.mark.django_db
def test_a_schedule_that_fails_anew_after_all_were_published_is_named_anew(
    caplog: pytest.LogCaptureFixture,
):
    scheduler, failure = Scheduler("default"), Unpublished("report", "no")
    for _ in range(2):
        scheduler.postpone(ExceptionGroup("no", [failure]))
        scheduler.turn()
    assert caplog.text.count("A schedule could not publish; report: no") == 2


@pytest.mark.django_db
def test_a_worker_soon_asks_for_schedules_again_though_what_it_knows_is_due_later():
    """Others may add one meanwhile, and nobody is told."""
    scheduler = Scheduler("default")
    for _ in range(2):  # without a schedule, and with one
        scheduler.turn()
        assert 0 < scheduler.seconds <= LOOK_EVERY
        daily()


@pytest.mark.django_db
def test_a_worker_asks_for_a_schedule_as_soon_as_it_is_due():
    daily(dtstart=timezone.now().replace(microsecond=0) + timedelta(seconds=2))
    scheduler = Scheduler("default")
    scheduler.turn()
    assert scheduler.seconds <= 2 < LOOK_EVERY


def test_what_a_schedule_fails_with_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture):
    failure = Unpublished("report", "ValueError: no\n\x1b[2Jworker 1 stopped")
    Scheduler("default").postpone(ExceptionGroup("no", [failure]))
    assert caplog.messages[0] == (
        "A schedule could not publish; report: ValueError: no \N{REPLACEMENT CHARACTER}[2Jworker 1"
        " stopped"
    )


@pytest.mark.django_db(transaction=True)
def test_many_workers_publish_each_occurrence_once():
    kept = daily(rrule="FREQ=MINUTELY", catchup="all")
    pass_time(kept, timedelta(hours=1, minutes=49))
    barrier = threading.Barrier(4)
    published: list[int] = []

    def work() -> None:
        barrier.wait(10)
        published.extend(Schedule.objects.publish_due() for _ in range(20))
        connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(published) == 50
    occurrences = [event.metadata["occurrence"] for event in Event.objects.all()]
    assert len(set(occurrences)) == len(occurrences) == 50


@pytest.mark.django_db
def test_a_start_of_just_now_is_the_first_occurrence():
    daily(rrule="FREQ=DAILY;COUNT=3", dtstart=timezone.now())
    assert Schedule.objects.publish_due() == 1


@pytest.mark.django_db
def test_schedules_that_are_created_in_bulk_occur():
    stream = Stream.objects.create(name="reports")
    kinds = {"rrule": "FREQ=DAILY", "dtstart": timezone.now(), "timezone": "UTC", "stream": stream}
    made = Schedule.objects.bulk_create(
        Schedule(name=f"report-{number}", subject="report.due", **kinds) for number in range(2)
    )
    assert Schedule.objects.publish_due() == len(made)

    wrong = Schedule(name="wrong", subject="report.due", **(kinds | {"rrule": "FREQ=NEVER"}))
    with pytest.raises(InvalidSchedule, match="NEVER"):
        Schedule.objects.bulk_create([Schedule(name="right", subject="report.due", **kinds), wrong])
    assert Schedule.objects.count() == len(made)


@pytest.mark.django_db(transaction=True)
def test_a_conflict_of_one_schedule_has_all_of_the_turn_repeated_in_read_committed():
    """Where the default is stricter, what was seen when the turn began is all that it can see."""
    pass_time(daily(), timedelta(hours=1))
    levels: list[str] = []

    def conflict_once(**_: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            levels.append(cursor.fetchone()[0])
            if len(levels) == 1:
                cursor.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

    with heard_by(conflict_once, signals.published):
        assert Schedule.objects.publish_due() == 1
    assert levels == ["read committed"] * 2
    assert Event.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_only_receivers_may_idle_in_a_schedules_turn():
    def allowed() -> str:
        with connection.cursor() as cursor:
            cursor.execute("SHOW idle_in_transaction_session_timeout")
            (setting,) = cursor.fetchone()
        return str(setting)

    usual = allowed()
    with brief("default"):
        assert allowed() == "5s"
        with patient("default"):
            assert allowed() == usual
        assert allowed() == "5s"


@pytest.mark.django_db(transaction=True)
def test_what_another_worker_has_locked_is_left_to_it_for_a_while():
    """A worker would otherwise ask again at once, and again, for as long as that takes."""
    pass_time(daily(), timedelta(hours=1))
    turns = Scheduler("default")
    with transaction.atomic():
        Schedule.objects.select_for_update().get()
        assert elsewhere(turns.turn) == 0
    assert turns.seconds > 0.5
    assert turns.turn() == 1


@pytest.mark.django_db
@pytest.mark.parametrize("catchup", ["all", "last"])
@pytest.mark.parametrize("rrule", ["FREQ=DAILY;COUNT=1", "FREQ=DAILY"])
def test_a_start_with_a_fraction_of_a_second_that_is_made_due_again_occurs(
    rrule: str, catchup: str
):
    started_at = timezone.now().replace(microsecond=250_000) - timedelta(hours=1)
    kept = daily(rrule=rrule, catchup=catchup, dtstart=started_at)
    assert Schedule.objects.publish_due() == 0

    Schedule.objects.filter(name=kept.name).update(next_at=F("dtstart"))
    kept.refresh_from_db()
    first = started_at.replace(microsecond=0)
    assert kept.upcoming(1) == [first]

    assert Schedule.objects.publish_due() == 1
    assert Schedule.objects.publish_due() == 0
    assert Event.objects.get().metadata["occurrence"] == first.astimezone(UTC).isoformat()
    kept.refresh_from_db()
    assert kept.last_at == first
    assert kept.next_at == (None if "COUNT" in rrule else first + DAY)


@pytest.mark.django_db
@pytest.mark.parametrize("catchup", ["all", "last"])
def test_what_was_published_in_the_same_second_is_not_published_again(catchup: str):
    kept = daily(catchup=catchup)
    pass_time(kept, timedelta(hours=1))
    assert Schedule.objects.publish_due() == 1
    kept.refresh_from_db()

    Schedule.objects.update(next_at=known(kept.last_at) + timedelta(microseconds=1))

    assert Schedule.objects.publish_due() == 0
    assert Event.objects.count() == 1
