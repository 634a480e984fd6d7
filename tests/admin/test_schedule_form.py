"""Schedules are written and changed in a form, which tells mistakes at their fields."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.utils import timezone

from kanthorq_django.admin.schedule_form import ScheduleForm
from kanthorq_django.models import Event, Schedule, Stream
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, text_of, told
from tests.admin.schedules import VIEWS, errors_of, filled, kept, shown_in

pytestmark = pytest.mark.django_db


@pytest.fixture
def stream() -> Stream:
    return Stream.objects.register("reports")


@pytest.fixture
def author(client_of: MakeClient) -> Client:
    return client_of("view_body", "add_schedule", "change_schedule", views=VIEWS)


class TestWriting:
    def test_a_new_schedule_occurs_next_by_the_clocks_of_its_zone(
        self, author: Client, stream: Stream
    ):
        response = author.post(page("schedule_add"), filled(stream, exdates="2026-12-28 09:00\r\n"))

        made = Schedule.objects.get()
        assert response["Location"] == page("schedule_changelist")
        assert made.dtstart == datetime(2026, 1, 5, 8, tzinfo=UTC)
        assert made.exdates == ["2026-12-28T08:00:00+00:00"]
        assert bytes(made.body) == b'{"kind": "weekly"}'
        assert made.next_at is not None
        assert timezone.now() < made.next_at <= timezone.now() + timedelta(weeks=1)
        assert (made.local(made.next_at).weekday(), made.local(made.next_at).hour) == (0, 9)
        assert LogEntry.objects.get().object_id == str(made.pk)

    def test_what_was_written_is_published(self, author: Client, stream: Stream):
        given = {"rrule": "FREQ=DAILY", "body": "a\r\nb", "metadata": '{"team": "x"}'}
        author.post(page("schedule_add"), filled(stream) | given)
        Schedule.objects.update(next_at=timezone.now() - timedelta(days=1))

        assert Schedule.objects.publish_due() == 1
        event = Event.objects.get()
        assert bytes(event.body) == b"a\nb"
        assert event.metadata["team"] == "x"

    @pytest.mark.parametrize(
        ("given", "field", "words"),
        [
            ({"name": ""}, "name", "required"),
            ({"name": "no spaces"}, "name", "cannot name a schedule"),
            ({"subject": "report.*"}, "subject", "wildcard"),
            ({"stream": "0"}, "stream", "valid choice"),
            ({"stream": ""}, "stream", "required"),
            ({"body": "x" * 300_000}, "body", "262,144"),
            ({"metadata": "{"}, "metadata", "not JSON"),
            ({"metadata": "[1]"}, "metadata", "JSON object"),
            ({"metadata": "[" * 100_000}, "metadata", "not JSON"),
            ({"metadata": '{"a": ' + "9" * 5_000 + "}"}, "metadata", "not JSON"),
            ({"metadata": '{"a": NaN}'}, "metadata", "nan"),
            ({"metadata": '{"a": "\\u0000"}'}, "metadata", "NUL"),
            ({"resource_key": "x" * 256}, "resource_key", "255"),
            ({"resource_key": "a\tb"}, "resource_key", "not printable"),
            ({"rrule": ""}, "rrule", "required"),
            ({"rrule": "every day"}, "rrule", "NAME=VALUE"),
            ({"rrule": "FREQ=SECONDLY"}, "rrule", "too frequent"),
            ({"rrule": "FREQ=DAILY;INTERVAL=0"}, "rrule", "INTERVAL must be 1 to 1000"),
            ({"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"}, "rrule", "never occurs"),
            ({"rrule": "FREQ=DAILY;" + "X=1;" * 200}, "rrule", "500 characters"),
            ({"dtstart": ""}, "dtstart", "required"),
            ({"dtstart": "soon"}, "dtstart", "is not a time"),
            ({"dtstart": "2026-01-05"}, "dtstart", "is not a time"),
            ({"dtstart": "2026-13-05T09:00"}, "dtstart", "is not a time"),
            ({"dtstart": "2026-01-05T09:00+02:00"}, "dtstart", "Leave the offset out"),
            ({"dtstart": "0001-01-01T00:00"}, "dtstart", "1900 to 3000"),
            ({"dtstart": "2026-03-29T02:30"}, "dtstart", "Europe/Berlin skip this time"),
            ({"timezone": ""}, "timezone", "required"),
            ({"timezone": "Mars/Olympus"}, "timezone", "valid choice"),
            ({"timezone": "../etc/passwd"}, "timezone", "valid choice"),
            ({"exdates": "tomorrow"}, "exdates", "is not a time"),
            ({"exdates": "2026-12-24"}, "exdates", "is not a time"),
            ({"exdates": "2026-12-24 09:00\n" * 1_001}, "exdates", "At most 1000"),
            ({"catchup": "some"}, "catchup", "valid choice"),
        ],
    )
    def test_a_mistake_is_told_in_words_at_its_field(
        self, author: Client, stream: Stream, given: dict[str, str], field: str, words: str
    ):
        errors = errors_of(author.post(page("schedule_add"), filled(stream) | given))

        assert errors.keys() == {field}
        assert words in " ".join(errors[field])
        assert not Schedule.objects.exists()

    def test_mistakes_in_several_fields_are_told_at_once(self, author: Client, stream: Stream):
        wrong = {"name": "?", "rrule": "FREQ=DAILY;COUNT=0", "metadata": "[]", "exdates": "x"}
        response = author.post(page("schedule_add"), filled(stream) | wrong)
        assert errors_of(response).keys() == wrong.keys()

    def test_a_name_is_taken_once(self, author: Client, stream: Stream):
        kept()
        assert errors_of(author.post(page("schedule_add"), filled(stream))).keys() == {"name"}

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"body": '{"kind": weekly}'}, "looks like JSON and is none"),
            ({"exdates": "2026-12-28 10:00"}, "No occurrences.*2026-12-28 10:00"),
            ({"rrule": "FREQ=DAILY;COUNT=1"}, "no further occurrence"),
        ],
    )
    def test_what_was_most_likely_not_meant_is_kept_with_a_warning(
        self, author: Client, stream: Stream, given: dict[str, str], words: str
    ):
        response = author.post(page("schedule_add"), filled(stream) | given)

        (warning,) = [text for level, text in told(response) if level == "warning"]
        assert re.search(words, warning)
        assert Schedule.objects.exists()


class TestChanging:
    def test_a_form_that_nobody_touched_changes_nothing(self, author: Client):
        row = kept(
            body=b"a\r\nb",
            dtstart=datetime(2026, 10, 25, 1, 30, 0, 7, tzinfo=UTC),  # the second 02:30 in Berlin
            exdates=[datetime(2026, 10, 26, 1, 30, 1, tzinfo=UTC)],
        )
        Schedule.objects.update(next_at=timezone.now() - timedelta(days=20))
        before = Schedule.objects.values().get()

        response = author.post(page("schedule_change", row.pk), shown_in(author, row))

        assert response.status_code == 302
        assert Schedule.objects.values().get() == before
        assert LogEntry.objects.get().change_message == "[]"

    def test_another_body_leaves_what_was_missed_to_be_caught_up(self, author: Client):
        row = kept(catchup="all")
        missed = timezone.now() - timedelta(days=20)
        Schedule.objects.update(next_at=missed)

        author.post(page("schedule_change", row.pk), shown_in(author, row) | {"body": "new"})

        row.refresh_from_db()
        assert (bytes(row.body), row.next_at) == (b"new", missed)

    def test_another_zone_keeps_the_local_times(self, author: Client):
        row = kept(exdates=[datetime(2026, 1, 12, 8, tzinfo=UTC)])

        given = shown_in(author, row) | {"timezone": "Asia/Tokyo"}
        author.post(page("schedule_change", row.pk), given)

        row.refresh_from_db()
        assert row.dtstart == datetime(2026, 1, 5, 0, tzinfo=UTC)
        assert row.exdates == ["2026-01-12T00:00:00+00:00"]
        assert row.next_at is not None
        assert row.local(row.next_at).hour == 9

    def test_a_change_overwrites_nothing_that_a_worker_wrote_meanwhile(
        self, author: Client, monkeypatch: pytest.MonkeyPatch
    ):
        row = kept()
        given = shown_in(author, row) | {"body": "new"}
        moved, last = timezone.now() + timedelta(days=3), timezone.now()
        clean = ScheduleForm.clean

        def work_meanwhile(form: ScheduleForm) -> Any:
            Schedule.objects.update(next_at=moved, last_at=last)
            return clean(form)

        monkeypatch.setattr(ScheduleForm, "clean", work_meanwhile)
        author.post(page("schedule_change", row.pk), given)

        row.refresh_from_db()
        assert (row.next_at, row.last_at, bytes(row.body)) == (moved, last, b"new")

    def test_a_cancelled_schedule_stays_cancelled(self, author: Client):
        row = kept()
        Schedule.objects.all().cancel()
        author.post(
            page("schedule_change", row.pk), shown_in(author, row) | {"rrule": "FREQ=DAILY"}
        )
        row.refresh_from_db()
        assert (row.rrule, row.next_at, row.life) == ("FREQ=DAILY", None, "cancelled")

    def test_a_body_that_is_no_text_is_shown_and_left_alone(self, author: Client):
        row = kept(body=b"\xff\x00")

        text = text_of(author.get(page("schedule_change", row.pk)))
        author.post(
            page("schedule_change", row.pk), shown_in(author, row) | {"body": "x", "name": "n"}
        )

        row.refresh_from_db()
        assert "ff 00" in text
        assert (bytes(row.body), row.name) == (b"\xff\x00", "n")

    def test_who_may_not_see_bodies_can_neither_read_nor_change_them(self, client_of: MakeClient):
        row, client = kept(body="secret"), client_of("change_schedule", views=VIEWS)

        shown = client.get(page("schedule_change", row.pk)).content.decode()
        given = shown_in(client, row) | {"body": "x", "name": "n"}
        response = client.post(page("schedule_change", row.pk), given)

        row.refresh_from_db()
        assert response.status_code == 302
        assert "secret" not in shown
        assert "you may not see it" in shown
        assert (bytes(row.body), row.name) == (b"secret", "n")
        assert "ody" not in LogEntry.objects.get().change_message

    def test_a_hidden_column_that_became_too_large_is_told_all_the_same(
        self, client_of: MakeClient, settings: Any
    ):
        row, client = kept(body="x" * 100), client_of("change_schedule", views=VIEWS)
        settings.KANTHORQ = {"BODY_SIZE_MAX": 10}
        errors = errors_of(
            client.post(page("schedule_change", row.pk), shown_in(client, row) | {"name": "n"})
        )
        assert "the limit is 10" in " ".join(errors["__all__"])

    def test_a_zone_that_is_gone_can_be_looked_at_and_replaced(self, author: Client):
        row = kept()
        Schedule.objects.update(timezone="Gone/Zone")

        assert errors_of(
            author.post(page("schedule_change", row.pk), shown_in(author, row))
        ).keys() == {"timezone"}
        given = shown_in(author, row) | {"timezone": "UTC"}
        assert author.post(page("schedule_change", row.pk), given).status_code == 302
