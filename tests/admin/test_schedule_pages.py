"""Schedules are looked at, cancelled, resumed and deleted in the admin."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from kanthorq_django.models import Schedule, Stream
from tests.admin.conftest import MakeClient
from tests.admin.pages import page, text_of, told
from tests.admin.schedules import VIEWS, filled, kept

pytestmark = pytest.mark.django_db


@pytest.fixture
def stream() -> Stream:
    return Stream.objects.register("reports")


@pytest.fixture
def operator(client_of: MakeClient) -> Client:
    return client_of("cancel_schedule", "resume_schedule", views=VIEWS)


@pytest.fixture
def viewer(client_of: MakeClient) -> Client:
    return client_of(views=VIEWS)


def move(client: Client, verb: str, *rows: Schedule) -> Any:
    data = {"action": verb, "index": "0", "_selected_action": [str(row.pk) for row in rows]}
    return client.post(page("schedule_changelist"), data)


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
    def test_actions_tell_how_many_were_updated_or_left_alone(self, operator: Client):
        first, second = kept("a"), kept("b")

        assert told(move(operator, "cancel", first)) == [
            ("success", "Cancel: 1 schedule updated. Changed: a")
        ]
        both = move(operator, "cancel", first, second)
        assert told(both)[-1] == (
            "warning",
            "Cancel: 1 schedule updated, 1 left alone. Left alone: a Changed: b",
        )
        resumed = move(operator, "resume", first, second)
        assert told(resumed)[-1] == ("success", "Resume: 2 schedules updated. Changed: a b")
        logged = [
            (entry.object_repr, entry.change_message) for entry in LogEntry.objects.order_by("pk")
        ]
        assert logged[:2] == [("a", "cancel"), ("b", "cancel")]
        assert sorted(logged[2:]) == [("a", "resume"), ("b", "resume")]

    def test_the_history_tells_why(self, operator: Client):
        row = kept()
        operator.post(page("schedule_cancel", row.pk), {"reason": "summer break"})
        assert LogEntry.objects.get().change_message == "cancel: summer break"

    def test_the_button_is_the_one_that_does_something(self, operator: Client):
        row = kept()
        moves = (
            ("cancel", "resume", "Stop this schedule"),
            ("resume", "cancel", "Resume this schedule"),
        )
        for verb, other, name in moves:
            shown = operator.get(page("schedule_change", row.pk)).content.decode()
            assert re.findall(r"<button .*>(.*)</button>", shown)[-1:] == [name]
            assert f'formaction="{page(f"schedule_{verb}", row.pk)}"' in shown
            assert page(f"schedule_{other}", row.pk) not in shown
            response = operator.post(page(f"schedule_{verb}", row.pk))
            assert response["Location"] == page("schedule_change", row.pk)
            assert told(response)[-1][0] == "success"
        row.refresh_from_db()
        assert row.life == "active"

    def test_what_cannot_be_resumed_is_told_and_nothing_is_changed(self, operator: Client):
        broken, fine = kept("broken"), kept("fine")
        Schedule.objects.all().cancel()
        Schedule.objects.filter(name="broken").update(timezone="Gone/Zone")

        ((level, text),) = told(move(operator, "resume", broken, fine))

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

    def test_a_get_on_an_operations_address_is_refused(self, operator: Client):
        row = kept()
        assert operator.get(page("schedule_cancel", row.pk)).status_code == 405
        row.refresh_from_db()
        assert row.life == "active"

    @pytest.mark.parametrize("selected", ["abc", "\x00", "1 OR 1=1"])
    def test_ticked_ids_that_are_none_are_refused(self, operator: Client, selected: str):
        data = {"action": "cancel", "index": "0", "_selected_action": [selected]}
        assert operator.post(page("schedule_changelist"), data).status_code == 400

    @pytest.mark.parametrize("key", ["abc", "%00", "9" * 40])
    def test_a_button_of_a_schedule_that_is_not_there_is_not_found(
        self, operator: Client, key: str
    ):
        assert operator.post(f"{page('schedule_changelist')}{key}/cancel/").status_code == 404

    def test_deleting_is_for_those_who_may_and_leaves_events(
        self, client_of: MakeClient, operator: Client
    ):
        row = kept()
        assert operator.post(page("schedule_delete", row.pk), {"post": "yes"}).status_code == 403
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
