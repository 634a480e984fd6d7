"""What operators change is written into the audit, in the transaction that changes it."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management.base import CommandError
from django.db import IntegrityError, InternalError, connection, transaction
from django.db.models.functions import Now
from django.db.transaction import TransactionManagementError
from django.test import Client

from kanthorq_django import publish, subscribe
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.exceptions import AuditIsAppendOnly
from kanthorq_django.management.account import shell_user
from kanthorq_django.models import Consumer, Event, OperatorAction, Schedule, Task, TaskState
from kanthorq_django.models.audit import SAMPLE_SIZE, Order
from kanthorq_django.models.maintenance.retention import prune
from tests.admin.pages import page, press, text_of, tick
from tests.admin.schedules import filled, shown_in
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, StreamFactory, TaskFactory

pytestmark = pytest.mark.django_db

ORDER = Order(operator="alice", origin=OperatorAction.Origin.ADMIN)


def the_action() -> OperatorAction:
    return OperatorAction.objects.get()


def added_by(client: Client) -> Schedule:
    client.post(page("schedule_add"), filled(StreamFactory.create()))
    return Schedule.objects.get()


@pytest.fixture
def boss(admin_client: Client) -> Client:
    return admin_client


@pytest.fixture
def refused_audit() -> Any:
    """The database refuses rows of the audit, for the test's transaction."""
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION pg_temp.refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE 'no audit today' USING ERRCODE = 'XX000'; END $$;"
            "CREATE TRIGGER refuse BEFORE INSERT ON kanthorq_django_operatoraction "
            "FOR EACH ROW EXECUTE FUNCTION pg_temp.refuse()"
        )


def test_an_action_in_the_admin_tells_who_what_how_many_and_why(boss: Client):
    waiting, done = TaskFactory.create(), TaskFactory.create(state=TaskState.COMPLETED)
    tick(boss, "cancel", [waiting, done], reason="wrong\nprice")
    told = the_action()
    assert (told.operator, told.origin, told.action) == ("admin", "admin", "tasks.cancel")
    assert told.user_id == str(User.objects.get().pk)
    assert told.counts == {"updated": 1, "requested": 0, "noop": 1}
    assert told.selection == {"ticked": [str(waiting.pk), str(done.pk)]}
    assert told.sample == [str(waiting.event_id)]
    assert told.reason == "wrong price"


def test_the_databases_clock_says_when(boss: Client):
    tick(boss, "cancel", [TaskFactory.create()])
    lately = OperatorAction.objects.filter(created_at__gt=Now() - timedelta(seconds=30))
    assert lately.filter(created_at__lte=Now()).exists()


def test_a_button_on_a_tasks_page_is_recorded(boss: Client):
    task = TaskFactory.create(state=TaskState.DISCARDED)
    press(boss, "resume", task)
    told = the_action()
    assert told.action == "tasks.resume"
    assert told.selection == {"event": str(task.event_id), "consumer": task.consumer.name}


def test_an_action_on_all_that_match_records_the_filters_and_keeps_the_reason(boss: Client):
    task = TaskFactory.create(state=TaskState.DISCARDED)
    address = f"{page('task_changelist')}?state__exact=-102"
    given = {
        "action": "resume",
        "index": "0",
        "select_across": "1",
        "_selected_action": [str(task.pk)],
        "reason": "mended",
    }
    asked = boss.post(address, given)
    assert b'name="reason" value="mended"' in asked.content
    more = {"confirmed": "yes", "through": str(task.pk), "after": "0", "updated": "0"}
    boss.post(address, given | more | {"requested": "0", "noop": "0"})
    told = the_action()
    assert told.selection == {"all_matching": {"state__exact": ["-102"]}}
    assert told.reason == "mended"


def test_what_changes_nothing_is_not_recorded(boss: Client):
    tick(boss, "release", [TaskFactory.create(state=TaskState.COMPLETED)])
    assert not OperatorAction.objects.exists()


def test_the_sample_is_bounded_and_the_counts_are_not(boss: Client):
    consumer = ConsumerFactory.create()
    tasks = [TaskFactory.create(consumer=consumer) for _ in range(SAMPLE_SIZE + 5)]
    tick(boss, "cancel", tasks)
    told = the_action()
    assert told.counts["updated"] == SAMPLE_SIZE + 5
    assert len(told.sample) == SAMPLE_SIZE
    assert told.selection["ticked"][-1] == "and 5 more"


def test_schedules_are_recorded_when_they_are_added_changed_moved_and_deleted(boss: Client):
    schedule = added_by(boss)
    changed = shown_in(boss, schedule) | {"subject": "report.other"}
    boss.post(page("schedule_change", schedule.pk), changed)
    for verb in ("cancel", "resume"):
        boss.post(page(f"schedule_{verb}", schedule.pk))
    boss.post(page("schedule_delete", schedule.pk), {"post": "yes"})
    actions = OperatorAction.objects.order_by("pk")
    verbs = ("add", "change", "cancel", "resume", "delete")
    assert [told.action for told in actions] == [f"schedules.{verb}" for verb in verbs]
    assert {tuple(told.sample) for told in actions} == {(schedule.name,)}
    assert actions[1].selection == {
        "schedule": schedule.name,
        "fields": {"subject": {"old": "report.due", "new": "report.other"}},
    }


def test_a_changed_schedule_tells_old_and_new_but_of_bodies_and_metadata(boss: Client):
    schedule = added_by(boss)
    changed = {"body": "b0dy", "metadata": '{"by": "m3ta"}', "rrule": "FREQ=DAILY"}
    more = {"dtstart": "2026-01-06T09:00", "exdates": "2026-01-07 09:00"}
    boss.post(page("schedule_change", schedule.pk), shown_in(boss, schedule) | changed | more)
    told = OperatorAction.objects.get(action="schedules.change")
    assert told.counts == {"fields": 5}
    assert told.selection["fields"] == {
        "body": "not kept here",
        "dtstart": {"old": "2026-01-05 08:00:00+00:00", "new": "2026-01-06 08:00:00+00:00"},
        "exdates": {"old": [], "new": ["2026-01-07T08:00:00+00:00"]},
        "metadata": "not kept here",
        "rrule": {"old": "FREQ=WEEKLY;BYDAY=MO", "new": "FREQ=DAILY"},
    }
    shown = text_of(boss.get(page("operatoraction_change", told.pk)))
    assert "FREQ=WEEKLY;BYDAY=MO" in shown
    assert "b0dy" not in shown
    assert "m3ta" not in shown


def test_schedules_deleted_by_the_dozen_are_recorded(boss: Client):
    schedule = added_by(boss)
    data = {"action": "delete_selected", "_selected_action": [str(schedule.pk)], "post": "yes"}
    boss.post(page("schedule_changelist"), data)
    told = OperatorAction.objects.latest("pk")
    assert (told.action, told.sample) == ("schedules.delete", [schedule.name])
    assert not Schedule.objects.exists()


@pytest.mark.parametrize("across", ["1", "true", "on"])
def test_all_schedules_are_recorded_as_all_however_the_form_says_it(boss: Client, across: str):
    ticked = added_by(boss)
    boss.post(page("schedule_add"), filled(ticked.stream, name="other"))
    data = {"action": "cancel", "index": "0", "select_across": across}
    boss.post(page("schedule_changelist") + "?q=r", data | {"_selected_action": [str(ticked.pk)]})
    told = OperatorAction.objects.latest("pk")
    assert told.counts == {"updated": 2, "noop": 0}
    assert told.selection == {"all_matching": {"q": ["r"]}}


def test_deleting_a_consumer_or_an_event_is_recorded(boss: Client):
    consumer, event = ConsumerFactory.create(), EventFactory.create()
    boss.post(page("consumer_delete", consumer.pk), {"post": "yes"})
    boss.post(page("event_delete", event.pk), {"post": "yes"})
    assert not Consumer.objects.exists()
    assert not Event.objects.exists()
    told = OperatorAction.objects.order_by("pk").values_list("action", "sample")
    expected = [("consumers.delete", [consumer.name]), ("events.delete", [str(event.pk)])]
    assert list(told) == expected


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        ("cancel", TaskState.AVAILABLE),
        ("resume", TaskState.DISCARDED),
        ("release", TaskState.PENDING),
        ("reset", TaskState.COMPLETED),
    ],
)
def test_a_verb_of_tasks_records_the_account_and_the_filters(verb: str, state: TaskState):
    task = TaskFactory.create(state=state)
    name = task.consumer.name
    kanthorq("tasks", verb, "--consumer", name, "--yes", "--reason", "tidy up")
    told = the_action()
    assert (told.operator, told.origin, told.user_id) == (shell_user(), "command", "")
    assert (told.action, told.reason) == (f"tasks.{verb}", "tidy up")
    assert told.selection == {"consumers": [name]}
    assert told.counts == {"updated": 1, "requested": 0, "noop": 0}
    assert told.sample == [str(task.event_id)]


@pytest.mark.parametrize(("uid", "told"), [(0, " (sudo by alice)"), (1, "")])
def test_who_stands_behind_sudo_is_told_of_root_alone(
    monkeypatch: pytest.MonkeyPatch, uid: int, told: str
):
    """Anybody else can set the variable."""
    monkeypatch.setattr("os.getuid", lambda: uid)
    monkeypatch.delenv("SUDO_USER", raising=False)
    plain = shell_user()
    monkeypatch.setenv("SUDO_USER", "alice")
    assert shell_user() == plain + told


def test_a_dry_run_records_nothing():
    task = TaskFactory.create()
    kanthorq("tasks", "cancel", "--consumer", task.consumer.name, "--dry-run")
    kanthorq("prune", "--older-than", "1d", "--dry-run")
    assert not OperatorAction.objects.exists()


def test_the_other_verbs_are_recorded_too(declared: Registry, boss: Client):
    @subscribe("order.paid", consumer="reader", stream="orders")
    def read(message):
        pass

    added_by(boss)
    OperatorAction.objects.prune(timedelta(0))
    kanthorq("sync", "reader")
    kanthorq("sync", "reader")
    kanthorq("publish", "order.paid", "secret", "--stream", "orders")
    kanthorq("schedules", "cancel", Schedule.objects.get().name, "--yes")
    told = list(OperatorAction.objects.order_by("pk"))
    names = ["consumers.sync", "events.publish", "schedules.cancel"]
    assert [action.action for action in told] == names
    assert told[1].sample == [str(Event.objects.get().pk)]
    assert "secret" not in str([vars(action) for action in told])


def test_prune_records_each_of_its_transactions():
    consumer = ConsumerFactory.create()
    for _ in range(3):
        TaskFactory.create(consumer=consumer, state=TaskState.COMPLETED)
    Consumer.objects.update(cursor="9999999:9999999:")
    kanthorq("prune", "--older-than", "0s", "--batch", "2", "--yes")
    told = OperatorAction.objects.order_by("pk").values_list("action", "counts")
    counts = [{"events": 2, "tasks": 2}, {"events": 1, "tasks": 1}]
    assert list(told) == [("events.prune", each) for each in counts]


@pytest.mark.parametrize("door", ["admin", "command"])
def test_if_the_audit_cannot_be_written_nothing_is_changed(
    boss: Client, refused_audit: None, door: str
):
    task = TaskFactory.create()
    command = ("tasks", "cancel", "--consumer", task.consumer.name, "--yes")
    doors: dict[str, Callable[[], object]] = {
        "admin": lambda: tick(boss, "cancel", [task]),
        "command": lambda: kanthorq(*command),
    }
    with transaction.atomic(), pytest.raises((InternalError, CommandError), match="no audit"):
        doors[door]()
    assert Task.objects.get().state == TaskState.AVAILABLE


def test_if_the_change_is_rolled_back_its_record_is_gone(boss: Client, monkeypatch):
    task = TaskFactory.create()
    seen = []
    record = Order.record

    def record_and_fail(self: Order, *args: Any, **kwargs: Any) -> None:
        record(self, *args, **kwargs)
        seen.append(OperatorAction.objects.count())
        raise RuntimeError("after the record")

    monkeypatch.setattr(Order, "record", record_and_fail)
    with pytest.raises(RuntimeError, match="after the record"):
        tick(boss, "cancel", [task])
    assert seen == [1]
    assert not OperatorAction.objects.exists()
    assert Task.objects.get().state == TaskState.AVAILABLE


@pytest.mark.django_db(transaction=True)
def test_a_record_outside_a_transaction_is_refused():
    with pytest.raises(TransactionManagementError, match="part of a transaction"):
        ORDER.record("tasks.cancel", using="default", counts={"updated": 1})


def test_a_row_is_never_edited_or_deleted_by_code():
    ORDER.record("tasks.cancel", using="default", counts={"updated": 1})
    told = the_action()
    told.operator = "mallory"
    rows = OperatorAction.objects.all()
    for attempt in (
        told.save,
        told.delete,
        rows.delete,
        lambda: rows.update(operator="mallory"),
        lambda: rows.bulk_update([told], ["operator"]),
        lambda: rows.bulk_create([told], update_conflicts=True, update_fields=["operator"]),
        lambda: OperatorAction.objects.update_or_create(pk=told.pk, defaults={"operator": "m"}),
    ):
        with pytest.raises(AuditIsAppendOnly):
            attempt()
    assert the_action().operator == "alice"


def test_a_new_row_takes_the_place_of_no_other():
    ORDER.record("tasks.cancel", using="default", counts={"updated": 1})
    forged = OperatorAction(pk=the_action().pk, operator="mallory")
    for save in (forged.save, lambda: OperatorAction.objects.bulk_create([forged])):
        with pytest.raises(IntegrityError), transaction.atomic():
            save()
    assert the_action().operator == "alice"


def test_nobody_adds_edits_or_deletes_rows_in_the_admin(boss: Client):
    ORDER.record("tasks.cancel", using="default", counts={"updated": 1})
    told = the_action()
    assert boss.get(page("operatoraction_changelist")).status_code == 200
    assert boss.get(page("operatoraction_change", told.pk)).status_code == 200
    for name, args in (("add", ()), ("change", (told.pk,)), ("delete", (told.pk,))):
        data: dict[str, Any] = {"operator": "mallory", "post": "yes"}
        assert boss.post(page(f"operatoraction_{name}", *args), data).status_code == 403
    data = {"action": "delete_selected", "_selected_action": [str(told.pk)], "post": "yes"}
    assert boss.post(page("operatoraction_changelist"), data).status_code == 403
    assert the_action().operator == "alice"


def test_prune_deletes_rows_older_than_the_retention_and_no_others(settings):
    for _ in range(2):
        ORDER.record("tasks.cancel", using="default", counts={"updated": 1})
    old = OperatorAction.objects.earliest("pk")
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE kanthorq_django_operatoraction SET created_at = now() - interval '91 days' "
            "WHERE id = %s",
            [old.pk],
        )
    settings.KANTHORQ = {"AUDIT_RETENTION": timedelta(days=90)}
    prune(timedelta(days=1))
    assert OperatorAction.objects.exclude(pk=old.pk).get() == the_action()


def test_texts_of_a_selection_are_cut_and_cleansed(boss: Client):
    task = TaskFactory.create(resource_key="k")
    data = {"action": "cancel", "index": "0", "select_across": "1", "confirmed": "yes"}
    more = {"through": str(task.pk), "after": "0", "updated": "0", "requested": "0", "noop": "0"}
    query = f"?q=k&o=%1b{'x' * 5_000}"  # an order that Django passes over
    boss.post(page("task_changelist") + query, data | more | {"_selected_action": [str(task.pk)]})
    (told,) = the_action().selection["all_matching"]["o"]
    assert len(told) < 500
    assert told.isprintable()


def test_an_order_of_which_nothing_came_is_not_recorded():
    with transaction.atomic():
        ORDER.record("tasks.cancel", using="default", counts={"updated": 0, "noop": 7})
    assert not OperatorAction.objects.exists()


def test_publish_of_a_program_is_no_operators_action():
    publish("order.paid", "x")
    assert not OperatorAction.objects.exists()
