"""What becomes of occurrences that nobody published in time, and whose turn comes first."""

from datetime import timedelta

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.utils import timezone

from kanthorq_django import schedule
from kanthorq_django.models import Event, Schedule

pytestmark = pytest.mark.django_db

SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)


def hourly(name: str, late: timedelta, catchup: str = "all") -> Schedule:
    """A schedule whose first occurrence was due ``late`` ago."""
    start = timezone.now().replace(microsecond=0) + HOUR
    kept = schedule(
        name, rrule="FREQ=HOURLY", dtstart=start, subject=name, stream="reports", catchup=catchup
    )
    moved = start - HOUR - late
    Schedule.objects.filter(pk=kept.pk).update(dtstart=moved, next_at=moved)
    return kept


@pytest.mark.parametrize(("late", "published"), [(30 * SECOND, 1), (120 * SECOND, 0)])
def test_what_is_published_a_little_late_was_not_missed(late: timedelta, published: int):
    kept = hourly("report", late, catchup="none")
    assert Schedule.objects.publish_due() == published
    kept.refresh_from_db()
    assert kept.next_at is not None
    assert kept.next_at > timezone.now()


def test_the_last_occurrence_stays_known_where_later_ones_are_missed():
    kept = hourly("report", 30 * SECOND, catchup="none")
    assert Schedule.objects.publish_due() == 1
    kept.refresh_from_db()
    last = kept.last_at
    assert last is not None
    missed = Now() - 120 * SECOND
    Schedule.objects.update(dtstart=missed, next_at=missed)
    assert Schedule.objects.publish_due() == 0
    kept.refresh_from_db()
    assert kept.last_at == last


def test_who_has_waited_longest_comes_first():
    # Further apart than the whole seconds that may begin while they are made.
    lates = {"b": 20 * SECOND, "d": 40 * SECOND, "a": 10 * SECOND, "c": 30 * SECOND}
    for name, late in lates.items():
        hourly(name, late)
    for _ in lates:
        Schedule.objects.publish_due(limit=1)
    subjects = Event.objects.order_by("created_at").values_list("subject", flat=True)
    assert list(subjects) == ["d", "c", "b", "a"]


@pytest.mark.parametrize("metadata", ["[]", '"text"', "null"])
def test_metadata_that_only_sql_can_write_stop_their_schedule_and_no_other(
    metadata: str, caplog: pytest.LogCaptureFixture
):
    broken, sound = hourly("broken", SECOND), hourly("sound", SECOND)
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE kanthorq_django_schedule SET metadata = %s::jsonb WHERE id = %s",
            [metadata, broken.pk],
        )
    assert Schedule.objects.publish_due() == 1
    assert "broken cannot go on and is cancelled" in caplog.text
    broken.refresh_from_db()
    sound.refresh_from_db()
    assert (broken.cancelled_at is None, sound.cancelled_at is None) == (False, True)
