"""``kanthorq reencrypt``: rotation of keys, a batch at a time."""

import threading
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.core.management.base import CommandError
from django.db import connection, connections, transaction
from django.test.utils import CaptureQueriesContext

from kanthorq_django import publish, publish_many
from kanthorq_django.management.verbs.reencrypt import Reencrypt
from kanthorq_django.models import Event, OperatorAction, Schedule
from kanthorq_django.models.maintenance.reencryption import _Rotation, reencrypt
from kanthorq_django.models.publishing.encryption import is_sealed, is_sealed_with
from tests.admin.schedules import kept
from tests.commands.console import kanthorq

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()


def published(count: int) -> list[Event]:
    return publish_many([Event(subject="a", body=f"body {number}") for number in range(count)])


def stored() -> list[bytes]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT body FROM kanthorq_django_event ORDER BY id")
        return [bytes(body) for (body,) in cursor.fetchall()]


def bodies() -> list[str]:
    return [bytes(event.body).decode() for event in Event.objects.order_by("pk")]


@pytest.fixture
def five_under_the_old_key(db: None, settings) -> None:
    settings.KANTHORQ = {"BODY_KEYS": [OLD]}
    published(5)
    kept(body="report")
    settings.KANTHORQ = {"BODY_KEYS": [NEW, OLD]}


def test_everything_is_under_the_first_key_afterwards(five_under_the_old_key: None, settings):
    ran = kanthorq("reencrypt", "--batch", "2", "--yes")
    assert ran.lines == ["6 of 6 bodies stored anew"]
    assert all(is_sealed_with(NEW, body) for body in stored())
    settings.KANTHORQ = {"BODY_KEYS": [NEW]}
    assert bodies() == [f"body {number}" for number in range(5)]
    assert bytes(Schedule.objects.get().body) == b"report"


def test_the_help_has_everybody_read_a_new_key_before_anybody_writes_with_it():
    told = " ".join(Reencrypt.description.split())
    assert told.index("behind the old one") < told.index("put it first") < told.index("take the")


def test_a_second_run_finds_nothing_to_do(five_under_the_old_key: None):
    kanthorq("reencrypt", "--yes")
    before = stored()
    assert kanthorq("reencrypt", "--yes").lines == ["0 of 6 bodies stored anew"]
    assert kanthorq("reencrypt", "--dry-run").status == 0
    assert stored() == before


def test_a_dry_run_counts_and_changes_nothing(five_under_the_old_key: None):
    before = stored()
    told = kanthorq("reencrypt", "--dry-run")
    assert told.lines == ["6 of 6 bodies would be stored anew"]
    assert told.status == 1, "a script would take the old key away"
    assert stored() == before
    assert not OperatorAction.objects.exists()


def test_each_batch_is_recorded(five_under_the_old_key: None):
    kanthorq("reencrypt", "--batch", "3", "--yes", "--reason", "yearly")
    told = OperatorAction.objects.order_by("pk").values_list("action", "counts", "reason")
    expected = [({"changed": count}) for count in (3, 2, 1)]
    assert list(told) == [("events.reencrypt", counts, "yearly") for counts in expected]


def test_bodies_from_before_there_were_keys_are_encrypted(db: None, settings):
    published(2)
    settings.KANTHORQ = {"BODY_KEYS": [NEW]}
    kanthorq("reencrypt", "--yes")
    assert all(is_sealed(body) for body in stored())
    assert bodies() == ["body 0", "body 1"]


def test_decrypt_stores_them_in_the_clear_again(five_under_the_old_key: None):
    kanthorq("reencrypt", "--decrypt", "--yes")
    assert stored() == [f"body {number}".encode() for number in range(5)]


def test_what_no_key_opens_is_named_and_kept(db: None, settings):
    settings.KANTHORQ = {"BODY_KEYS": [OLD]}
    lost = publish("a", "x")
    before = stored()
    settings.KANTHORQ = {"BODY_KEYS": [NEW]}
    publish("a", "y")
    ran = kanthorq("reencrypt", "--yes")
    assert ran.status == 1
    assert f"No key opens 1 body: {lost.pk}\n" in ran.err
    assert stored()[:1] == before


def test_without_keys_it_says_so(db: None):
    with pytest.raises(CommandError, match="no key to work with"):
        kanthorq("reencrypt", "--yes")


def test_without_a_terminal_it_asks_nobody_and_changes_nothing(five_under_the_old_key: None):
    before = stored()
    with pytest.raises(CommandError, match="--yes"):
        kanthorq("reencrypt")
    assert stored() == before


@pytest.mark.django_db(transaction=True)
def test_what_somebody_has_locked_is_left_to_the_next_run(settings):
    settings.KANTHORQ = {"BODY_KEYS": [OLD]}
    first, _second = published(2)
    settings.KANTHORQ = {"BODY_KEYS": [NEW, OLD]}
    locked, done = threading.Event(), threading.Event()

    def lock() -> None:
        try:
            with transaction.atomic():
                Event.objects.select_for_update().get(pk=first.pk)
                locked.set()
                done.wait(30)
        finally:
            connections.close_all()

    thread = threading.Thread(target=lock)
    thread.start()
    assert locked.wait(30)
    ran = kanthorq("reencrypt", "--yes")
    done.set()
    thread.join()
    assert (ran.status, ran.lines) == (1, ["1 of 2 bodies stored anew"])
    assert kanthorq("reencrypt", "--yes").lines == ["1 of 2 bodies stored anew"]


@pytest.mark.django_db(transaction=True)
def test_a_body_that_somebody_changes_meanwhile_is_not_put_back(
    settings, monkeypatch: pytest.MonkeyPatch
):
    kept(body="old report")
    settings.KANTHORQ = {"BODY_KEYS": [NEW]}
    renewed = _Rotation._renewed

    def changed_meanwhile(rotation: _Rotation, page: Any) -> Any:
        found = renewed(rotation, page)
        if page:  # there are no events
            kept(body="new report")
        return found

    monkeypatch.setattr(_Rotation, "_renewed", changed_meanwhile)
    assert reencrypt("default").left == 1
    assert bytes(Schedule.objects.get().body) == b"new report"


def test_a_body_is_stored_in_one_round_trip(five_under_the_old_key: None):
    with CaptureQueriesContext(connection) as queries:
        assert reencrypt("default").changed == 6
    # Of events and of schedules: a savepoint, the lock, its release, and a look for the page.
    assert len(queries) <= 6 + 2 * 5


@pytest.mark.django_db(transaction=True)
def test_each_row_has_an_xmin_of_its_own_afterwards(settings):
    settings.KANTHORQ = {"BODY_KEYS": [OLD]}
    published(5)
    settings.KANTHORQ = {"BODY_KEYS": [NEW, OLD]}
    assert reencrypt("default").changed == 5
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(DISTINCT xmin::text) FROM kanthorq_django_event")
        assert cursor.fetchone() == (5,)
