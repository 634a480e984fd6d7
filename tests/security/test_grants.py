"""Everything works under roles that have what ``kanthorq grants`` prints, and no more."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management.base import CommandError
from django.db import ProgrammingError, connection, transaction
from django.test import Client
from psycopg.errors import InsufficientPrivilege

from kanthorq_django import publish, publish_many, schedule
from kanthorq_django.models import Consumer, Event, OperatorAction, Schedule, Task, TaskState
from kanthorq_django.models.maintenance.privileges import ROLES, TABLES
from tests.admin.pages import page, press, tick
from tests.admin.schedules import filled
from tests.commands.console import kanthorq
from tests.concurrency import wait_until
from tests.factories import TaskFactory
from tests.ledger.models import Entry
from tests.processes import runworker

pytestmark = pytest.mark.django_db(transaction=True)

# What Django's admin needs of the project's own tables.
ADMIN_TABLES = "auth_user, django_session, django_admin_log, django_content_type"


def run(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def name_of(role: str) -> str:
    """Roles belong to the cluster, which other runs share."""
    return f"{connection.settings_dict['NAME']}_{role}"


@pytest.fixture
def roles(transactional_db: None) -> Iterator[None]:
    for role in ROLES:
        run(f"CREATE ROLE {name_of(role)}")
    run(kanthorq("grants", *(f"{role}={name_of(role)}" for role in ROLES)).out)
    run(f"GRANT SELECT, INSERT ON {Entry._meta.db_table} TO {name_of('worker')}")
    run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {ADMIN_TABLES} TO {name_of('operator')}")
    yield
    for role in ROLES:
        run(f"DROP OWNED BY {name_of(role)}; DROP ROLE {name_of(role)}")


@contextmanager
def acting_as(role: str) -> Iterator[None]:
    run(f"SET ROLE {name_of(role)}")
    try:
        yield
    finally:
        run("RESET ROLE")


@pytest.fixture
def boss(db: None) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("boss"))
    return client


@contextmanager
def worker_process() -> Iterator[Any]:
    options = f"-c role={name_of('worker')}"
    with runworker(
        "atomic", "transactional", "--poll-interval", "0.1", PGOPTIONS=options
    ) as worker:
        yield worker


def test_events_are_published_handled_and_acknowledged_by_roles_with_the_least(roles: None):
    with acting_as("publisher"):
        first = publish("entry.one", {"n": 1}, stream="ledger", idempotency_key="one")
        again = publish("entry.one", {"n": 1}, stream="ledger", idempotency_key="one")
        many = [Event(subject="entry.many", body=str(n).encode()) for n in range(3)]
        publish_many(many, stream="ledger")
        keyed = [Event(subject="entry.key", idempotency_key=key) for key in ("a", "b", "one")]
        with pytest.raises(ValueError, match="another subject"):
            publish_many(keyed, stream="ledger")
        publish_many(keyed[:2], stream="ledger")
    assert (again.pk, again.created, again.json()) == (first.pk, False, {"n": 1})
    schedule(
        "ticks",
        rrule="FREQ=DAILY;COUNT=1",
        dtstart=datetime.now(UTC),
        subject="entry.tick",
        stream="ledger",
    )
    with worker_process() as worker:
        wait_until(lambda: Entry.objects.count() == 14, 30)
        assert worker.terminate() == 0
        assert "permission denied" not in worker.text
    assert set(Task.objects.values_list("state", flat=True)) == {TaskState.COMPLETED}
    assert Schedule.objects.get().next_at is None


def test_an_operator_acts_in_the_admin_and_on_the_console(roles: None, boss: Client):
    waiting, discarded, done = (
        TaskFactory.create(state=state)
        for state in (TaskState.AVAILABLE, TaskState.DISCARDED, TaskState.COMPLETED)
    )
    Consumer.objects.filter(pk=done.consumer_id).update(cursor="99999999:99999999:")
    with acting_as("operator"):
        assert tick(boss, "cancel", [waiting], reason="test").status_code == 302
        assert press(boss, "resume", discarded).status_code == 302
        assert boss.get(page("event_changelist")).status_code == 200
        assert boss.get(page("event_change", done.event_id)).status_code == 200
        assert boss.get(page("consumer_changelist")).status_code == 200
        assert boss.get(page("consumer_change", done.consumer_id)).status_code == 200
        assert boss.post(page("schedule_add"), filled(waiting.consumer.stream)).status_code == 302
        planned = Schedule.objects.get()
        assert boss.post(page("schedule_cancel", planned.pk)).status_code == 302
        kanthorq("tasks", "cancel", "--consumer", discarded.consumer.name, "--yes")
        kanthorq("schedules", "resume", planned.name, "--yes")
        assert boss.post(page("schedule_delete", planned.pk), {"post": "yes"}).status_code == 302
        deleted = boss.post(page("event_delete", done.event_id), {"post": "yes"})
        assert deleted.status_code == 302
        deleted = boss.post(page("consumer_delete", waiting.consumer_id), {"post": "yes"})
        assert deleted.status_code == 302
    assert OperatorAction.objects.count() == 9
    assert not Event.objects.filter(pk=done.event_id).exists()


def test_a_viewer_looks_at_everything_but_bodies(roles: None):
    task = TaskFactory.create(state=TaskState.DISCARDED)
    with acting_as("viewer"):
        assert task.consumer.name in kanthorq("stats").out
        assert str(task.event_id) in kanthorq("tasks", "list").out
        assert kanthorq("schedules", "list").status == 0
        health = kanthorq("health").out
        assert "permission denied" not in health
        assert "others' are hidden from this role, which lacks pg_read_all_stats" in health
        with pytest.raises(CommandError, match="permission denied"):
            kanthorq("tasks", "show", task.event_id)


def test_a_pruner_prunes_and_forgets_old_actions(roles: None, settings):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    Consumer.objects.filter(pk=task.consumer_id).update(cursor="99999999:99999999:")
    settings.KANTHORQ = {"AUDIT_RETENTION": timedelta(microseconds=1)}
    with acting_as("pruner"):
        told = kanthorq("prune", "--older-than", "0s", "--yes").lines
    assert told == ["1 event and 1 task pruned, and 1 row of the audit"]
    assert not OperatorAction.objects.exists()


def test_an_operator_who_prunes_leaves_the_audit_alone(roles: None, settings):
    task = TaskFactory.create(state=TaskState.COMPLETED)
    Consumer.objects.filter(pk=task.consumer_id).update(cursor="99999999:99999999:")
    settings.KANTHORQ = {"AUDIT_RETENTION": timedelta(microseconds=1)}
    with acting_as("operator"):
        kanthorq("prune", "--older-than", "0s", "--yes")
    assert OperatorAction.objects.get().action == "events.prune"


TABLE_NAMES = {name: f"kanthorq_django_{name}" for name in TABLES}
WITH_XID = (
    "INSERT INTO {event} (id, stream_id, subject, body, metadata, resource_key, xid) "
    "VALUES (gen_random_uuid(), 1, 'a', '', '{{}}', '', '7'::xid8)"
)
FORBIDDEN = {
    "publisher": (
        WITH_XID,
        "COPY {event} (id, xid) FROM STDIN",
        "SELECT body FROM {event}",
        "SELECT * FROM {event}",
        "SELECT octet_length(body) FROM {event}",
        "UPDATE {event} SET subject = 'b'",
        "DELETE FROM {event}",
        "SELECT id FROM {task}",
        "UPDATE {task} SET state = -101",
        "UPDATE {consumer} SET \"cursor\" = '1:1:'",
        "SELECT body FROM {schedule}",
        "INSERT INTO {operatoraction} (operator, origin, action) VALUES ('x', 'admin', 'x')",
        "TRUNCATE {event}",
    ),
    "worker": (
        WITH_XID,
        "DELETE FROM {event}",
        "UPDATE {event} SET body = ''",
        "DELETE FROM {task}",
        "DELETE FROM {consumer}",
        "UPDATE {schedule} SET body = ''",
        "DELETE FROM {schedule}",
        "SELECT id FROM {operatoraction}",
        "DELETE FROM {operatoraction}",
    ),
    "viewer": (
        "SELECT body FROM {event}",
        "SELECT body FROM {schedule}",
        "INSERT INTO {event} (id) VALUES (gen_random_uuid())",
        "UPDATE {task} SET state = -101",
        "DELETE FROM {task}",
        "DELETE FROM {operatoraction}",
        "SELECT id FROM {task} FOR UPDATE",
    ),
    "operator": (
        "INSERT INTO {event} (id) VALUES (gen_random_uuid())",
        "UPDATE {event} SET body = ''",
        "UPDATE {consumer} SET \"cursor\" = '1:1:'",
        "INSERT INTO {task} (consumer_id, event_id) VALUES (1, gen_random_uuid())",
        "UPDATE {operatoraction} SET operator = 'mallory'",
        "DELETE FROM {operatoraction}",
        "TRUNCATE {operatoraction}",
    ),
    "pruner": (
        "SELECT body FROM {event}",
        "INSERT INTO {event} (id) VALUES (gen_random_uuid())",
        "UPDATE {task} SET state = 1",
        "UPDATE {operatoraction} SET operator = 'mallory'",
        "DELETE FROM {consumer}",
        "DELETE FROM {schedule}",
    ),
}


@pytest.mark.parametrize("role", ROLES)
def test_no_role_can_do_the_work_of_another(roles: None, role: str):
    with acting_as(role):
        for template in FORBIDDEN[role]:
            statement = template.format(**TABLE_NAMES)
            with pytest.raises(ProgrammingError) as caught, transaction.atomic():
                run(statement)
            assert isinstance(caught.value.__cause__, InsufficientPrivilege), statement


def test_running_the_grants_again_takes_away_what_was_too_much(roles: None):
    publisher = name_of("publisher")
    run(f"GRANT ALL ON kanthorq_django_event TO {publisher}")
    run(kanthorq("grants", f"publisher={publisher}").out)
    with acting_as("publisher"), pytest.raises(ProgrammingError, match="permission denied"):
        run("SELECT body FROM kanthorq_django_event")


def test_one_database_role_may_be_several_of_ours(roles: None):
    both = name_of("publisher")
    run(kanthorq("grants", f"publisher={both}", f"worker={both}").out)
    with acting_as("publisher"):
        publish("entry.one", "x")
        assert bytes(Event.objects.get().body) == b"x"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("admin", "is no role"),
        ("worker=" + "x" * 64, "1 to 63 bytes"),
        ("worker=a\nb", "printab"),
        ("worker=", "'' must be a name of 1 to 63 bytes"),  # as of an empty shell variable
    ],
)
def test_what_is_no_role_is_refused_in_a_sentence(given: str, told: str):
    with pytest.raises(CommandError, match=told):
        kanthorq("grants", given)


def test_names_are_quoted():
    told = kanthorq("grants", 'viewer=a"; DROP TABLE x; --', "--schema", 'q"').out
    assert 'TO "a""; DROP TABLE x; --";' in told
    assert 'ON SCHEMA "q""" TO' in told
