"""Ways around the front door: addresses, orders, searches and fields that no page offers."""

import json
import logging
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode

import pytest
from django.apps import apps
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test import Client
from django.urls import reverse

from kanthorq_django import publish, subscribe
from kanthorq_django.admin.task import TaskAdmin
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.models import Event, OperatorAction, Task, TaskState, Worker
from kanthorq_django.models.audit import Order
from kanthorq_django.testing import drain
from tests.admin.conftest import MakeClient, client_of
from tests.admin.pages import page, press, text_of, tick
from tests.admin.schedules import kept, shown_in
from tests.commands.console import kanthorq
from tests.factories import TaskFactory

__all__ = ["client_of"]  # a fixture

pytestmark = pytest.mark.django_db

SECRET = "confidential"  # noqa: S105  # what a body says
HOSTILE = "pay\x1b[2J\r\nERROR forged\u202e"
NOUNS = ("stream", "event", "consumer", "task", "worker", "schedule", "operatoraction")
VIEWS = tuple(f"view_{noun}" for noun in NOUNS)
OURS = list(apps.get_app_config("kanthorq_django").get_models())


@pytest.fixture
def rows() -> dict[str, Any]:
    """A row of each noun, all of them with something to hide."""
    task = TaskFactory.create(
        state=TaskState.DISCARDED,
        event__body=SECRET,
        event__metadata={"note": SECRET},
        result={"note": SECRET},
        attempted_errors=[{"attempt": 1, "verb": "handle", "error": SECRET, "stack": SECRET}],
    )
    order = Order(operator="a", origin=OperatorAction.Origin.ADMIN, selection={"note": SECRET})
    order.record("tasks.cancel", using="default", counts={"updated": 1})
    return {
        "stream": task.consumer.stream,
        "event": task.event,
        "consumer": task.consumer,
        "task": task,
        "worker": Worker.objects.create(host="shop-1", pid=42, concurrency=10, consumers=["x"]),
        "schedule": kept(body=SECRET, metadata={"note": SECRET}),
        "operatoraction": OperatorAction.objects.get(),
    }


def everything() -> str:
    models: list[Any] = [*OURS, LogEntry]
    tables = [list(model._base_manager.values()) for model in models]
    return json.dumps(tables, default=str)


class TestLooking:
    def test_no_address_changes_anything_by_a_get(self, admin_client: Client, rows: Any):
        before = everything()
        for noun, row in rows.items():
            for address in _addresses(noun, row):
                for query in ("", "?post=yes&action=cancel&_selected_action=1&confirmed=yes"):
                    response = admin_client.get(address + query)
                    assert response.status_code in {200, 302, 400, 403, 404, 405}, address
                    assert admin_client.head(address + query).status_code < 500
        assert everything() == before

    @pytest.mark.parametrize("noun", NOUNS)
    def test_no_search_finds_what_it_does_not_show(
        self, client_of: MakeClient, rows: Any, noun: str
    ):
        client = client_of(*VIEWS, views=())
        for term in (SECRET, SECRET[:5], "%", rows["event"].xid):
            found = client.get(page(f"{noun}_changelist"), {"q": term}).context["cl"]
            assert found.result_count == 0

    @pytest.mark.parametrize("noun", NOUNS)
    def test_no_list_is_sorted_by_what_it_does_not_show(
        self, admin_client: Client, rows: Any, noun: str
    ):
        hidden = {"body", "metadata", "result", "attempted_errors", "selection", "idempotency_key"}
        for order in ("body", "-body", "metadata", *map(str, range(-15, 16))):
            response = admin_client.get(page(f"{noun}_changelist"), {"o": order})
            by = {str(name).strip("-") for name in response.context["cl"].queryset.query.order_by}
            assert not by & hidden

    @pytest.mark.parametrize("field", ["body", "metadata", "idempotency_key", "result", "xid"])
    def test_no_field_can_be_named_that_a_page_is_to_show_instead_of_the_id(
        self, admin_client: Client, rows: Any, field: str
    ):
        for noun in ("event", "task", "schedule"):
            for address in (page(f"{noun}_changelist"), page(f"{noun}_change", rows[noun].pk)):
                response = admin_client.get(address, {"_to_field": field, "_popup": "1"})
                assert response.status_code == 400

    @pytest.mark.parametrize(
        ("noun", "field", "remote"),
        [
            ("task", "event", "event"),
            ("task", "consumer", "consumer"),
            ("event", "stream", "stream"),
        ],
    )
    def test_completing_shows_no_more_than_the_list_and_to_the_same_people(
        self, client_of: MakeClient, rows: Any, noun: str, field: str, remote: str
    ):
        asked = {"app_label": "kanthorq_django", "model_name": noun, "field_name": field}
        address = reverse("admin:autocomplete")
        others = client_of(*(set(VIEWS) - {f"view_{remote}"}), views=())
        assert others.get(address, asked | {"term": ""}).status_code == 403
        may = client_of(f"view_{remote}", views=())
        told = may.get(address, asked | {"term": ""}).json()["results"]
        assert str(rows[remote]) in [each["text"] for each in told]
        assert may.get(address, asked | {"term": SECRET}).json()["results"] == []

    def test_an_event_names_its_tasks_to_those_who_may_view_tasks(
        self, client_of: MakeClient, rows: Any
    ):
        address = page("event_change", rows["event"].pk)
        told = text_of(client_of("view_event", views=()).get(address))
        assert "Discarded" not in told
        assert rows["consumer"].name not in told
        assert "Discarded" in text_of(client_of("view_event", "view_task", views=()).get(address))

    @pytest.mark.parametrize("noun", NOUNS)
    def test_a_history_is_for_those_who_may_view_its_row(
        self, client_of: MakeClient, rows: Any, noun: str
    ):
        address = page(f"{noun}_history", rows[noun].pk)
        assert client_of(*(set(VIEWS) - {f"view_{noun}"}), views=()).get(address).status_code == 403
        told = client_of(f"view_{noun}", views=()).get(address)
        assert told.status_code == 200
        assert SECRET not in told.content.decode()

    def test_histories_and_the_audit_do_not_repeat_what_was_written(
        self, admin_client: Client, rows: Any
    ):
        row = rows["schedule"]
        given = shown_in(admin_client, row) | {
            "body": "new-secret",
            "metadata": '{"n": "new-secret"}',
        }
        assert admin_client.post(page("schedule_change", row.pk), given).status_code == 302
        for model in (LogEntry, OperatorAction):
            written = str(list(model._base_manager.values()))
            assert "body" in written.lower()
            assert "new-secret" not in written


class TestActing:
    @pytest.fixture
    def others(self, monkeypatch: pytest.MonkeyPatch, rows: Any) -> Task:
        """Hide a task, as a project's own ModelAdmin does for the rows of other customers."""
        shown = TaskAdmin.get_queryset
        consumers = [rows["consumer"].pk]

        def of_ours(self: TaskAdmin, request: Any) -> Any:
            return shown(self, request).filter(consumer__in=consumers)

        monkeypatch.setattr(TaskAdmin, "get_queryset", of_ours)
        task: Task = TaskFactory.create(state=TaskState.DISCARDED)
        return task

    def test_a_row_that_the_list_hides_is_out_of_reach(self, admin_client: Client, others: Task):
        before = everything()
        assert press(admin_client, "resume", others).status_code == 404
        assert tick(admin_client, "resume", [others]).status_code == 302
        assert admin_client.get(page("task_change", others.pk)).status_code == 302
        assert everything() == before

    def test_all_that_match_are_those_that_the_list_shows(
        self, admin_client: Client, others: Task, rows: Any
    ):
        sure = {"select_across": "1", "confirmed": "yes", "after": "0", "updated": "0"}
        sure |= {"requested": "0", "noop": "0", "through": str(others.pk)}
        assert tick(admin_client, "resume", [rows["task"]], **sure).status_code == 302
        others.refresh_from_db()
        rows["task"].refresh_from_db()
        assert (others.state, rows["task"].state) == (TaskState.DISCARDED, TaskState.AVAILABLE)

    @pytest.mark.parametrize("elsewhere", ["https://evil.example/", "//evil.example/", "\\\\evil"])
    def test_no_answer_leads_to_another_site(self, admin_client: Client, rows: Any, elsewhere: str):
        named = dict.fromkeys(("next", "_changelist_filters", "q"), elsewhere)
        ticked = {"action": "resume", "_selected_action": [str(rows["task"].pk)]}
        for address in (
            page("task_resume", rows["task"].pk),
            page("schedule_cancel", rows["schedule"].pk),
            page("task_changelist"),
        ):
            answer = admin_client.post(f"{address}?{urlencode(named)}", named | ticked)
            assert answer.status_code == 302
            assert answer["Location"].startswith("/admin/kanthorq_django/")
        asked = tick(admin_client, "resume", [rows["task"]], select_across="1", next=elsewhere)
        assert f'href="{elsewhere}' not in asked.content.decode()

    def test_a_key_of_another_type_or_path_is_no_row(self, admin_client: Client, rows: Any):
        before = everything()
        for key in ("0", "-1", "1.0", "%2e%2e", "1/../1", "1;x", "9" * 40, "None", "%00"):
            for noun, verb in (("task", "resume"), ("schedule", "cancel")):
                address = page(f"{noun}_changelist") + f"{key}/{verb}/"
                assert admin_client.post(address).status_code in {404, 405}, address
        assert everything() == before

    @pytest.mark.parametrize("noun", [noun for noun in NOUNS if noun != "schedule"])
    def test_nothing_is_deleted_by_the_dozen(self, admin_client: Client, rows: Any, noun: str):
        data = {
            "action": "delete_selected",
            "_selected_action": [str(rows[noun].pk)],
            "post": "yes",
            "select_across": "1",
        }
        before = everything()
        assert admin_client.post(page(f"{noun}_changelist"), data).status_code == 403
        assert everything() == before

    @pytest.mark.parametrize("noun", ["stream", "task", "worker", "operatoraction"])
    def test_what_is_never_deleted_by_hand_has_no_way_to_be(
        self, admin_client: Client, rows: Any, noun: str
    ):
        before = everything()
        assert (
            admin_client.post(page(f"{noun}_delete", rows[noun].pk), {"post": "yes"}).status_code
            == 403
        )
        assert everything() == before


class TestShowing:
    """A database role that may insert events need not go through publish()."""

    @pytest.fixture
    def forged(self, declared: Registry) -> Event:
        @subscribe(">", consumer="payer", stream="s")
        def pay(message):
            raise ValueError(HOSTILE)

        event = publish("pay.x", stream="s", resource_key="x")
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE kanthorq_django_event SET subject = %s, resource_key = %s",
                [HOSTILE, HOSTILE],
            )
        return event

    def test_a_forged_subject_stays_on_its_line_of_the_log(self, forged: Event, caplog: Any):
        with caplog.at_level(logging.DEBUG, logger="kanthorq_django"):
            drain("payer")
        assert "forged" in caplog.text
        for record in caplog.records:
            assert record.getMessage().isprintable()
            assert str(vars(record).get("subject", "")).isprintable()

    def test_a_forged_subject_steers_no_terminal(self, forged: Event):
        drain("payer")
        for verb in (
            ("tasks", "list"),
            ("tasks", "show", str(forged.pk)),
            ("tasks", "list", "--json"),
            ("stats",),
            ("health",),
        ):
            lines = kanthorq(*verb).out.split("\n")
            assert all(line.isprintable() for line in lines), verb
            assert not any(line.startswith("ERROR forged") for line in lines), verb

    def test_a_forged_subject_turns_no_text_around_in_lists(
        self, forged: Event, admin_client: Client
    ):
        drain("payer")
        for noun in ("event", "task"):
            told = admin_client.get(page(f"{noun}_changelist")).content.decode()
            assert "forged" in told
            assert "\u202e" not in told
            assert "\x1b" not in told


def _addresses(noun: str, row: Any) -> Iterable[str]:
    yield page(f"{noun}_changelist")
    yield page(f"{noun}_add")
    for view in ("change", "history", "delete"):
        yield page(f"{noun}_{view}", row.pk)
    verbs = {"task": ("cancel", "resume", "release", "reset"), "schedule": ("cancel", "resume")}
    for verb in verbs.get(noun, ()):
        yield page(f"{noun}_{verb}", row.pk)
