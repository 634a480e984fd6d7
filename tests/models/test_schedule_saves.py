"""What ``save()`` writes of a schedule that workers and operators move meanwhile, and where to."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.db.models import F, Value
from django.db.models.functions import Concat
from django.db.models.signals import post_save
from django.utils import timezone

from kanthorq_django.exceptions import InvalidSchedule, KanthorqError
from kanthorq_django.models import Schedule, Stream
from kanthorq_django.models.scheduling.progress import PROGRESS

pytestmark = pytest.mark.django_db

START = datetime(2026, 1, 1, 9, tzinfo=UTC)
LATER = datetime(2030, 1, 1, 9, tzinfo=UTC)

Change = Callable[[Schedule], None]


def made(**given: Any) -> Schedule:
    options: dict[str, Any] = {
        "name": "report",
        "stream": Stream.objects.register("reports"),
        "rrule": "FREQ=DAILY",
        "dtstart": START,
        "timezone": "UTC",
        "subject": "report.due",
    }
    return Schedule(**(options | given))


def create(**given: Any) -> Schedule:
    kept = made(**given)
    kept.save()
    return kept


@contextmanager
def rolled_back() -> Iterator[None]:
    with transaction.atomic():
        yield
        transaction.set_rollback(True)


def stored() -> Schedule:
    return Schedule.objects.get()


def set_all(kept: Schedule) -> None:
    kept.next_at, kept.last_at, kept.cancelled_at = LATER, START, START


def progress(kept: Schedule) -> tuple[datetime | None, ...]:
    return kept.next_at, kept.last_at, kept.cancelled_at


@pytest.mark.parametrize("update_fields", [None, ["next_at", "last_at", "cancelled_at"]])
def test_what_was_rolled_back_is_written_by_the_next_save(update_fields: list[str] | None):
    kept = create()
    set_all(kept)
    with rolled_back():
        kept.save(update_fields=update_fields)
    assert stored().last_at is None

    kept.save()

    assert progress(kept) == progress(stored()) == (LATER, START, START)


def test_what_was_saved_twice_before_a_rollback_is_written_by_the_next_save():
    kept = create()
    set_all(kept)
    with rolled_back():
        kept.save()
        kept.body = b"new"
        kept.save()
    kept.save()
    assert progress(stored()) == (LATER, START, START)


def test_what_only_a_savepoint_rolled_back_is_written_by_the_next_save():
    kept = create()
    set_all(kept)
    savepoint = str(connection.savepoint())
    kept.save()
    transaction.savepoint_rollback(savepoint)
    kept.save()
    assert progress(stored()) == (LATER, START, START)


@pytest.mark.django_db(transaction=True)
def test_what_was_committed_is_not_written_again_when_an_operator_undoes_it():
    kept = create()
    kept.cancelled_at = START
    kept.save()
    Schedule.objects.all().resume()

    kept.body = b"new"
    kept.save()

    assert kept.life == stored().life == "active"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("is_new", [True, False])
def test_what_a_transaction_wrote_is_known_once_it_commits(is_new: bool):
    kept = made() if is_new else create()
    with transaction.atomic():
        kept.cancelled_at = START
        kept.save()
    Schedule.objects.all().resume()
    kept.body = b"new"
    kept.save()
    assert stored().life == "active"


def change_the_body(kept: Schedule) -> None:
    kept.body = b"new"


def sort_the_exdates(kept: Schedule) -> None:
    kept.exdates.sort()


@pytest.mark.parametrize(
    "exdates",
    [["2026-01-05T09:00:00Z"], ["2030-01-01T09:00:00+00:00", "2026-01-05T09:00:00+00:00"]],
)
@pytest.mark.parametrize("change", [change_the_body, sort_the_exdates])
def test_what_was_missed_is_kept_whatever_form_exdates_are_stored_in(
    exdates: list[str], change: Change
):
    create()
    Schedule.objects.update(exdates=exdates, next_at=START)
    kept = stored()
    change(kept)
    kept.save()
    assert stored().next_at == START


STALE: dict[str, Any] = {
    "body": b"x" * 40,
    "exdates": ["no moment"],
    "timezone": "Mars/Olympus",
    "catchup": "some",
    "subject": "no subject",
}


@pytest.mark.parametrize("column", STALE)
@pytest.mark.parametrize("update_fields", [None, ["resource_key"]])
def test_what_is_not_changed_is_not_checked(
    column: str, update_fields: list[str] | None, settings: Any
):
    create()
    settings.KANTHORQ = {"BODY_SIZE_MAX": 20}
    Schedule.objects.update(**{column: STALE[column]})
    kept = stored()
    kept.resource_key, kept.cancelled_at = "key", START
    kept.save(update_fields=update_fields)
    assert stored().resource_key == "key"
    assert getattr(stored(), column) == STALE[column]
    setattr(kept, column, STALE[column] + STALE[column])
    with pytest.raises(KanthorqError):
        kept.save()


def test_a_changed_rule_is_checked_with_all_that_it_depends_on():
    create()
    Schedule.objects.update(timezone="Mars/Olympus")
    kept = stored()
    kept.rrule = "FREQ=YEARLY"
    with pytest.raises(InvalidSchedule, match="Mars/Olympus"):
        kept.save()


def test_what_sql_makes_of_a_column_is_stored_unchecked():
    kept = create()
    kept.subject = Concat(F("subject"), Value(".again"))  # type: ignore[assignment]  # Django's way
    kept.save(update_fields=["subject"])
    assert stored().subject == "report.due.again"


@pytest.mark.django_db(transaction=True)
def test_a_receiver_may_take_its_time():
    limits: list[str] = []

    def look_at_limit(**_: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SHOW idle_in_transaction_session_timeout")
            limits.append(cursor.fetchone()[0])

    kept = create()
    post_save.connect(look_at_limit, sender=Schedule)
    try:
        kept.body = b"new"
        kept.save()
        Schedule.objects.all().cancel()
    finally:
        post_save.disconnect(look_at_limit, sender=Schedule)
    assert limits == ["0", "0"]


@pytest.mark.django_db(transaction=True)
def test_transactions_that_are_managed_by_hand_are_followed_too():
    kept = create()
    transaction.set_autocommit(False)
    try:
        set_all(kept)
        kept.save(update_fields=["next_at", "last_at", "cancelled_at"])
        transaction.rollback()
        kept.save()
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert progress(stored()) == (LATER, START, START)


@pytest.mark.django_db(transaction=True)
def test_what_an_inner_block_lost_is_written_though_the_outer_one_commits():
    kept = create()
    with transaction.atomic():
        kept.cancelled_at = START
        kept.save()
        with rolled_back():
            kept.last_at = START
            kept.save()
    kept.save()
    assert (stored().cancelled_at, stored().last_at) == (START, START)


def test_what_moves_after_a_save_in_the_same_transaction_stays():
    kept = create()
    kept.next_at = LATER
    kept.save()
    Schedule.objects.all().cancel()
    kept.save()
    assert progress(kept) == progress(stored())
    assert stored().next_at is None


@pytest.mark.parametrize("copied", [copy.copy, lambda kept: pickle.loads(pickle.dumps(kept))])  # noqa: S301
def test_copies_of_an_instance_know_what_it_has_set(copied: Callable[[Schedule], Schedule]):
    kept = create()
    kept.next_at = LATER
    kept.save()
    kept.cancelled_at = START
    copied(kept).save()
    assert progress(stored()) == (LATER, None, START)


def test_what_was_set_outlasts_a_refresh_of_other_columns():
    kept = create()
    set_all(kept)
    kept.refresh_from_db(fields=["name"])
    kept.refresh_from_db(from_queryset=Schedule.objects.defer(*PROGRESS))
    kept.save()
    assert progress(stored()) == (LATER, START, START)


def test_what_was_set_is_forgotten_by_a_refresh_of_its_own_column():
    kept = create()
    kept.next_at = kept.last_at = LATER
    kept.refresh_from_db(fields=iter(["next_at"]))
    Schedule.objects.update(next_at=START)
    kept.save()
    assert progress(stored()) == (START, LATER, None)


def test_a_null_that_was_set_is_forgotten_by_a_refresh_that_reads_one():
    kept = create()
    kept.next_at = None
    Schedule.objects.update(next_at=None)
    kept.refresh_from_db()
    Schedule.objects.update(next_at=LATER)
    kept.save()
    assert stored().next_at == LATER


def test_what_was_set_outlasts_columns_that_are_loaded_later():
    create(cancelled_at=START)
    kept = Schedule.objects.only("name").get()
    kept.next_at, kept.cancelled_at = LATER, None
    assert (kept.rrule, kept.last_at) == ("FREQ=DAILY", None)
    kept.save()
    assert progress(stored()) == (LATER, None, None)


def test_a_column_that_is_loaded_later_is_not_taken_for_one_that_was_set():
    create()
    kept = Schedule.objects.only("name").get()
    assert kept.next_at is not None
    Schedule.objects.update(next_at=LATER)
    kept.name = "other"
    kept.save()
    assert stored().next_at == LATER


def test_a_column_that_was_not_loaded_may_be_named():
    create()
    Schedule.objects.update(last_at=START)
    kept = Schedule.objects.only("name").get()
    kept.rrule = "FREQ=YEARLY"
    kept.save(update_fields=["rrule", "last_at"])
    assert progress(stored()) == (kept.upcoming()[0], START, None)


def test_what_was_set_is_written_though_nothing_else_was_loaded():
    create()
    kept = Schedule.objects.only("name").get()
    kept.cancelled_at = START
    kept.save()
    assert stored().life == "cancelled"


@pytest.mark.parametrize("column", ["name", "rrule"])
def test_what_was_set_outlasts_a_save_of_other_columns(column: str):
    kept = create()
    set_all(kept)
    setattr(kept, column, {"name": "other", "rrule": "FREQ=YEARLY"}[column])
    kept.save(update_fields=[column])
    assert stored().life == "active"
    kept.save()
    assert progress(stored()) == (LATER, START, START)


def test_a_changed_rule_of_a_running_schedule_goes_on_whatever_else_waits_to_be_saved():
    kept = create()
    kept.rrule, kept.cancelled_at = "FREQ=YEARLY", START
    kept.save(update_fields=["rrule"])
    assert stored().next_at == stored().upcoming()[0]


def test_schedules_that_are_saved_after_their_bulk_keep_what_moved_meanwhile():
    kept, given = Schedule.objects.bulk_create([made(), made(name="given", next_at=LATER)])
    Schedule.objects.update(next_at=START, last_at=START)
    for each in (kept, given):
        each.body = b"new"
        each.save()
    assert set(Schedule.objects.values_list("next_at", "last_at")) == {(START, START)}


def test_schedules_whose_bulk_was_rolled_back_are_saved_as_they_were_given():
    kept = made(next_at=LATER)
    with rolled_back():
        Schedule.objects.bulk_create([kept])
    kept.save()
    assert stored().next_at == LATER


def test_a_schedule_whose_creation_was_rolled_back_is_created_by_the_next_save():
    kept, given = made(), made(name="given", next_at=LATER)
    with rolled_back():
        kept.save()
        given.save()
    kept.rrule = "FREQ=YEARLY"
    kept.save()
    given.save()
    assert kept.next_at == Schedule.objects.get(name="report").upcoming()[0]
    assert Schedule.objects.get(name="given").next_at == LATER


def without_pk(kept: Schedule) -> None:
    kept.pk, kept.name = None, "copy"


def with_another_pk(kept: Schedule) -> None:
    kept.pk, kept.name = Schedule().pk, "copy"


def deleted_meanwhile(kept: Schedule) -> None:
    Schedule.objects.filter(pk=kept.pk).delete()


def deleted(kept: Schedule) -> None:
    kept.delete()


@pytest.mark.parametrize("keys", [[], [Fernet.generate_key().decode()]])
@pytest.mark.parametrize("change", [without_pk, with_another_pk, deleted_meanwhile, deleted])
def test_a_row_that_does_not_exist_is_inserted_as_one_that_has_not_occurred_yet(
    change: Change, keys: list[str], settings: Any
):
    settings.KANTHORQ = {"BODY_KEYS": keys}
    create(body=b"hello")
    Schedule.objects.update(next_at=START, last_at=START)
    kept = stored()
    change(kept)
    kept.rrule = "FREQ=YEARLY"

    kept.save()

    inserted = Schedule.objects.get(name=kept.name)
    assert (inserted.pk, inserted.last_at) == (kept.pk, None)
    assert inserted.next_at == kept.next_at == inserted.upcoming()[0] > timezone.now()
    assert inserted.body == b"hello"


@pytest.mark.django_db(transaction=True)
def test_a_copy_of_a_schedule_that_was_just_saved_has_not_occurred_yet():
    kept = create()
    kept.next_at = kept.last_at = START
    kept.save()
    without_pk(kept)
    kept.save()
    assert progress(kept) == (kept.upcoming()[0], None, None)
    assert kept.upcoming()[0] > timezone.now()


def test_what_is_set_on_a_copy_is_inserted():
    kept = create()
    without_pk(kept)
    kept.next_at = LATER
    kept.save()
    assert Schedule.objects.get(name="copy").next_at == LATER


def test_a_copy_that_was_refused_is_inserted_by_the_next_save():
    kept = create()
    kept.pk = None
    with pytest.raises(IntegrityError), transaction.atomic():
        kept.save()
    kept.name = "copy"
    kept.save()
    assert Schedule.objects.count() == 2


def test_a_copy_that_cannot_be_kept_is_refused():
    kept = create()
    without_pk(kept)
    kept.resource_key = "\x07"
    with pytest.raises(ValueError, match="resource_key"):
        kept.save()
    assert Schedule.objects.count() == 1
    assert connection.is_usable()


@pytest.mark.parametrize(
    "options",
    [
        {"force_update": True},
        {"update_fields": ["name"]},
        {"update_fields": ["next_at"]},
        {"update_fields": ["name", "next_at"], "force_update": True},
    ],
)
@pytest.mark.parametrize("change", [without_pk, with_another_pk, deleted_meanwhile])
def test_an_update_of_a_row_that_does_not_exist_is_refused_by_django(
    change: Change, options: dict[str, Any]
):
    kept = create()
    change(kept)
    with pytest.raises(DatabaseError, match="did not affect any rows"), transaction.atomic():
        kept.save(**options)
    assert not Schedule.objects.filter(pk=kept.pk).exists()


def test_a_deleted_row_of_which_little_was_loaded_is_refused_by_django():
    create()
    kept = Schedule.objects.only("name").get()
    deleted_meanwhile(kept)
    with pytest.raises(DatabaseError, match="did not affect any rows"), transaction.atomic():
        kept.save()


@pytest.mark.django_db(databases=["default", "other"])
@pytest.mark.parametrize("loaded", [(), ("name",)])
def test_a_schedule_is_saved_to_a_database_that_does_not_have_it(loaded: tuple[str, ...]):
    kept = create()
    Schedule.objects.update(next_at=START, last_at=START)
    Stream.objects.using("other").create(pk=kept.stream_id, name="reports")
    rows = Schedule.objects.only(*loaded) if loaded else Schedule.objects.all()

    rows.get().save(using="other")

    there = Schedule.objects.using("other").get()
    assert (there.pk, there.last_at) == (kept.pk, None)
    assert there.next_at == there.upcoming()[0]
    assert progress(stored()) == (START, START, None)


@pytest.mark.django_db(databases=["default", "other"])
def test_a_schedule_that_is_saved_to_another_database_keeps_what_moved_there():
    kept = create()
    Stream.objects.using("other").create(pk=kept.stream_id, name="reports")
    kept.save(using="other")
    Schedule.objects.using("other").update(next_at=LATER)
    here = stored()
    here.body = b"new"
    here.save(using="other")
    there = Schedule.objects.using("other").get()
    assert (there.next_at, there.body) == (LATER, b"new")
