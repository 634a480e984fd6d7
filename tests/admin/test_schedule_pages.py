"""Schedules are written, looked at, cancelled and resumed in the admin."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kanthorq_django import schedule
from kanthorq_django.models import Event, Schedule, Stream
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, text_of, told

pytestmark = pytest.mark.django_db

ALL = ("view_body", "add_schedule", "change_schedule", "cancel_schedule", "resume_schedule")
VIEWS = ("view_schedule",)


@pytest.fixture
def stream() -> Stream:
    return Stream.objects.register("reports")


@pytest.fixture
def author(client_of: MakeClient) -> Client:
    return client_of(*ALL, views=VIEWS)


@pytest.fixture
def viewer(client_of: MakeClient) -> Client:
    return client_of(views=VIEWS)


def kept(name: str = "report", **given: Any) -> Schedule:
    options: dict[str, Any] = {
        "rrule": "FREQ=WEEKLY;BYDAY=MO",
        "dtstart": datetime(2026, 1, 5, 8, tzinfo=UTC),  # a Monday, 09:00 in Berlin
        "timezone": "Europe/Berlin",
        "subject": "report.due",
        "stream": "reports",
        "body": b'{"kind": "weekly"}',
        "metadata": {"by": "code"},
    }
    return schedule(name, **(options | given))


def filled(stream: Stream, **given: Any) -> dict[str, Any]:
    """Return what a browser sends for a new schedule."""
    return {
        "name": "report",
        "stream": stream.pk,
        "subject": "report.due",
        "body": '{"kind": "weekly"}',
        "metadata": "{}",
        "resource_key": "",
        "rrule": "FREQ=WEEKLY;BYDAY=MO",
        "dtstart": "2026-01-05T09:00",
        "timezone": "Europe/Berlin",
        "exdates": "",
        "catchup": "last",
    } | given


def shown_in(client: Client, row: Schedule) -> dict[str, Any]:
    """Return what the browser would send back for a form that nobody touched."""
    form = client.get(page("schedule_change", row.pk)).context["adminform"].form
    return {
        name: form[name].value() if form[name].value() is not None else "" for name in form.fields
    }


def errors_of(response: Any) -> dict[str, list[str]]:
    assert response.status_code == 200
    return dict(response.context["adminform"].form.errors)


def move(client: Client, verb: str, *rows: Schedule) -> Any:
    data = {"action": verb, "index": "0", "_selected_action": [str(row.pk) for row in rows]}
    return client.post(page("schedule_changelist"), data)


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

    def test_a_change_overwrites_nothing_that_a_worker_wrote_meanwhile(self, author: Client):
        row = kept()
        given = shown_in(author, row) | {"body": "new"}
        moved, last = timezone.now() + timedelta(days=3), timezone.now()
        Schedule.objects.update(next_at=moved, last_at=last)

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


class TestLooking:
    def test_the_list_tells_rule_occurrences_state_and_stream(self, viewer: Client):
        kept("active")
        kept("cancelled"), Schedule.objects.filter(name="cancelled").cancel()
        kept("ended", rrule="FREQ=DAILY;COUNT=1")

        text = text_of(viewer.get(page("schedule_changelist")))

        assert "active every week on Monday at 09:00 Europe/Berlin" in text
        assert "— Cancelled reports" in text
        assert "— Ended reports" in text
        assert "from now" in text.replace("\xa0", " ")

    @pytest.mark.parametrize("life", ["active", "cancelled", "ended"])
    def test_a_list_is_filtered_by_state(self, viewer: Client, life: str):
        kept("active")
        kept("cancelled"), Schedule.objects.filter(name="cancelled").cancel()
        kept("ended", rrule="FREQ=DAILY;COUNT=1")
        listed = viewer.get(page("schedule_changelist"), {"life": life}).context["cl"]
        assert [row.name for row in listed.result_list] == [life]

    def test_the_page_tells_the_next_five_in_local_time_and_in_words(self, viewer: Client):
        row = kept()

        text = text_of(viewer.get(page("schedule_change", row.pk))).replace("\xa0", " ")

        for upcoming in row.upcoming(5):
            local = row.local(upcoming)
            assert f"{local:%A} {local.day} {local:%B %Y}, 09:00:00 {local.tzname()} (" in text
        assert text.count("09:00:00 CE") == 5 + 1  # and the start

    def test_across_a_change_of_the_clocks_local_time_stays_local(self, viewer: Client):
        row = kept(
            rrule="FREQ=YEARLY;BYMONTH=3,10;BYDAY=-1SU", dtstart=datetime(2026, 1, 5, 8, tzinfo=UTC)
        )
        text = text_of(viewer.get(page("schedule_change", row.pk)))
        assert len(re.findall(r"Sunday \d+ March \d+, 09:00:00 CEST", text)) >= 2
        assert len(re.findall(r"Sunday \d+ October \d+, 09:00:00 CET", text)) >= 2

    def test_a_list_asks_as_much_for_many_schedules_as_for_few(self, viewer: Client):
        counts = []
        for names in ("ab", "cdefg"):
            for name in names:
                kept(name)
            with CaptureQueriesContext(connection) as queries:
                viewer.get(page("schedule_changelist"))
            counts.append(len(queries))
        assert counts[0] == counts[1]

    def test_what_cannot_be_read_any_more_is_shown_all_the_same(self, viewer: Client):
        row = kept()
        Schedule.objects.update(timezone="Gone/Zone", rrule="FREQ=FORTNIGHTLY")
        assert "FREQ=FORTNIGHTLY" in text_of(viewer.get(page("schedule_changelist")))
        assert "cannot be read any more" in text_of(viewer.get(page("schedule_change", row.pk)))

    def test_a_viewer_sees_no_body_no_form_no_actions_and_no_buttons(self, viewer: Client):
        row = kept(body="secret")

        listed = viewer.get(page("schedule_changelist"))
        shown = viewer.get(page("schedule_change", row.pk)).content.decode()

        assert listed.context["action_form"] is None
        assert "secret" not in shown
        assert 'name="rrule"' not in shown
        assert "formaction" not in shown

    def test_a_viewer_who_may_see_bodies_sees_it_indented(self, client_of: MakeClient):
        row = kept()
        shown = client_of("view_body", views=VIEWS).get(page("schedule_change", row.pk))
        assert '"kind": "weekly"' in shown.content.decode().replace("&quot;", '"')


class TestMoving:
    def test_actions_tell_how_many_were_updated_or_left_alone(self, author: Client):
        first, second = kept("a"), kept("b")

        assert told(move(author, "cancel", first)) == [("success", "Cancel: 1 schedule updated.")]
        both = move(author, "cancel", first, second)
        assert told(both)[-1] == ("warning", "Cancel: 1 schedule updated, 1 left alone: a.")
        resumed = move(author, "resume", first, second)
        assert told(resumed)[-1] == ("success", "Resume: 2 schedules updated.")
        logged = [
            (entry.object_repr, entry.change_message) for entry in LogEntry.objects.order_by("pk")
        ]
        assert logged[:2] == [("a", "cancel"), ("b", "cancel")]
        assert sorted(logged[2:]) == [("a", "resume"), ("b", "resume")]

    def test_the_button_is_the_one_that_does_something(self, author: Client):
        row = kept()
        for verb, other in (("cancel", "resume"), ("resume", "cancel")):
            shown = author.get(page("schedule_change", row.pk)).content.decode()
            assert f'formaction="{page(f"schedule_{verb}", row.pk)}"' in shown
            assert page(f"schedule_{other}", row.pk) not in shown
            response = author.post(page(f"schedule_{verb}", row.pk))
            assert response["Location"] == page("schedule_change", row.pk)
            assert told(response)[-1][0] == "success"
        row.refresh_from_db()
        assert row.life == "active"

    def test_what_cannot_be_resumed_is_told_and_nothing_is_changed(self, author: Client):
        broken, fine = kept("broken"), kept("fine")
        Schedule.objects.all().cancel()
        Schedule.objects.filter(name="broken").update(timezone="Gone/Zone")

        ((level, text),) = told(move(author, "resume", broken, fine))

        assert level == "error"
        assert "nothing was changed" in text
        assert "Gone/Zone" in text
        assert not LogEntry.objects.exists()
        assert {row.life for row in Schedule.objects.all()} == {"cancelled"}

    @pytest.mark.parametrize("verb", ["cancel", "resume"])
    def test_each_verb_needs_its_own_permission(self, client_of: MakeClient, verb: str):
        row, other = kept(), {"cancel": "resume", "resume": "cancel"}[verb]
        client = client_of(f"{other}_schedule", "change_schedule", views=VIEWS)

        assert move(client, verb, row).status_code == 403
        assert client.post(page(f"schedule_{verb}", row.pk)).status_code == 403
        assert (
            client_of(f"{verb}_schedule", views=())
            .post(page(f"schedule_{verb}", row.pk))
            .status_code
            == 403
        )
        row.refresh_from_db()
        assert row.life == "active"
        assert not LogEntry.objects.exists()

    def test_a_get_on_an_operations_address_is_refused(self, author: Client):
        row = kept()
        assert author.get(page("schedule_cancel", row.pk)).status_code == 405
        row.refresh_from_db()
        assert row.life == "active"

    @pytest.mark.parametrize("selected", ["abc", "\x00", "1 OR 1=1"])
    def test_ticked_ids_that_are_none_are_refused(self, author: Client, selected: str):
        data = {"action": "cancel", "index": "0", "_selected_action": [selected]}
        assert author.post(page("schedule_changelist"), data).status_code == 400

    @pytest.mark.parametrize("key", ["abc", "%00", "9" * 40])
    def test_a_button_of_a_schedule_that_is_not_there_is_not_found(self, author: Client, key: str):
        assert author.post(f"{page('schedule_changelist')}{key}/cancel/").status_code == 404

    def test_deleting_is_for_those_who_may_and_leaves_events(
        self, client_of: MakeClient, author: Client
    ):
        row = kept()
        assert author.post(page("schedule_delete", row.pk), {"post": "yes"}).status_code == 403
        client = client_of("delete_schedule", views=VIEWS)
        assert client.post(page("schedule_delete", row.pk), {"post": "yes"}).status_code == 302
        assert not Schedule.objects.exists()

    @pytest.mark.parametrize("address", ["schedule_add", "schedule_change"])
    def test_a_viewer_cannot_write(self, viewer: Client, stream: Stream, address: str):
        row = kept()
        args = () if address == "schedule_add" else (row.pk,)
        response = viewer.post(page(address, *args), filled(stream, name="other"))
        assert response.status_code == 403
        assert Schedule.objects.get().name == "report"
