"""Bodies at rest, encrypted with the keys of the settings and bound to their events."""

import json
import sys
from base64 import b64encode
from typing import Any
from uuid import UUID

import pytest
from cryptography.fernet import Fernet
from django.core import serializers
from django.db import connection, transaction
from django.test import Client
from django.utils import timezone

from kanthorq_django import publish, publish_many, schedule, subscribe
from kanthorq_django.checks import check_encryption
from kanthorq_django.domain.subscriptions import Registry
from kanthorq_django.exceptions import (
    ConfigurationError,
    IdempotencyConflict,
    InvalidBody,
    UndecodableEvent,
)
from kanthorq_django.models import Event, Schedule, Task, TaskState
from kanthorq_django.models.publishing import encryption
from kanthorq_django.models.publishing.body import MARK
from kanthorq_django.models.publishing.encryption import fernet, seal, unseal
from kanthorq_django.testing import drain
from tests.admin.pages import page
from tests.admin.schedules import errors_of, shown_in

pytestmark = pytest.mark.django_db

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()
CARD = "4111 1111 1111 1111"


@pytest.fixture(autouse=True)
def keys(settings) -> None:
    settings.KANTHORQ = {"BODY_KEYS": [OLD]}


def stored(event: Event) -> bytes:
    with connection.cursor() as cursor:
        cursor.execute("SELECT body FROM kanthorq_django_event WHERE id = %s", [event.pk])
        return bytes(cursor.fetchone()[0])


def put(event: Event, body: bytes) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE kanthorq_django_event SET body = %s WHERE id = %s", [body, event.pk])


def test_what_is_stored_holds_nothing_of_the_body():
    event = publish("card.used", {"card": CARD})
    assert CARD.encode() not in stored(event)
    assert stored(event).startswith(MARK)


def test_the_event_reads_back_as_it_was_published():
    event = publish("card.used", {"card": CARD}, metadata={"clear": True})
    assert event.json() == {"card": CARD}
    read = Event.objects.get(pk=event.pk)
    assert read.json() == {"card": CARD}
    assert bytes(read.body) == bytes(event.body)
    assert (read.subject, read.metadata) == ("card.used", {"clear": True})


@pytest.mark.parametrize("is_there", [True, False])
def test_a_fixture_is_stored_encrypted(is_there: bool):
    event, planned = publish("card.used", {"card": CARD}), declare(CARD)
    dump = serializers.serialize("json", [event, planned])
    assert b64encode(planned.body).decode() in dump  # a fixture is plain: other keys may read it
    if not is_there:
        Event.objects.all().delete()
        Schedule.objects.all().delete()
    for loaded in serializers.deserialize("json", dump):
        loaded.save()
        row: Any = loaded.object
        assert bytes(row.body) in {bytes(event.body), bytes(planned.body)}
    assert Event.objects.get().json() == {"card": CARD}
    assert Schedule.objects.get().body == CARD.encode()
    for body in (*Event.objects.values_list("body"), *Schedule.objects.values_list("body")):
        assert bytes(body[0]).startswith(MARK)


def test_without_keys_a_fixture_is_stored_as_it_is(settings):
    settings.KANTHORQ = {}
    dump = serializers.serialize("json", [publish("card.used", CARD)])
    for loaded in serializers.deserialize("json", dump):
        loaded.save()
        row: Any = loaded.object
        assert bytes(row.body) == CARD.encode()
    assert stored(Event.objects.get()) == CARD.encode()


def test_events_that_are_copied_are_encrypted_each_for_itself():
    first, second = publish_many([Event(subject="a", body=CARD), Event(subject="a", body=CARD)])
    assert CARD.encode() not in stored(first) + stored(second)
    assert stored(first) != stored(second)
    assert [event.body for event in Event.objects.order_by("pk")] == [CARD.encode()] * 2


def test_a_deferred_body_is_opened_too():
    event = publish("card.used", CARD)
    assert Event.objects.defer("body").get(pk=event.pk).body == CARD.encode()


@pytest.mark.django_db(databases=["default", "other"])
def test_a_deferred_body_is_read_where_its_event_is():
    publish("card.used", CARD, using="other")
    assert Event.objects.using("other").defer("body").get().body == CARD.encode()


@pytest.mark.parametrize("fields", [None, ["body"], ["subject", "body"]])
@pytest.mark.parametrize("is_opened", [True, False])
def test_an_event_that_is_refreshed_has_its_body_read_anew_if_that_is_meant(
    fields: list[str] | None, is_opened: bool
):
    event = Event.objects.get(pk=publish("card.used", CARD).pk)
    if is_opened:
        assert event.body == CARD.encode()
    put(event, seal(event.pk, b"expired"))
    event.refresh_from_db(fields=["subject"])
    assert event.body == CARD.encode()
    event = Event.objects.get(pk=event.pk)
    if is_opened:
        assert event.body == b"expired"
    put(event, seal(event.pk, b"renewed"))
    event.refresh_from_db(fields=fields)
    assert event.body == b"renewed"


def test_a_handler_gets_the_plain_body(declared: Registry):
    seen = []

    @subscribe("card.used", consumer="reader", stream="cards")
    def read(message):
        seen.append(message.event.body)

    publish("card.used", CARD, stream="cards")
    drain()
    assert seen == [CARD.encode()]


def test_bodies_stored_before_there_were_keys_are_still_read(settings):
    settings.KANTHORQ = {}
    event = publish("card.used", CARD)
    settings.KANTHORQ = {"BODY_KEYS": [OLD]}
    assert stored(event) == CARD.encode()
    assert Event.objects.get(pk=event.pk).body == CARD.encode()


def test_the_first_key_encrypts_and_every_key_decrypts(settings):
    before = publish("card.used", CARD)
    settings.KANTHORQ = {"BODY_KEYS": [NEW, OLD]}
    after = publish("card.used", CARD)
    settings.KANTHORQ = {"BODY_KEYS": [NEW]}
    assert Event.objects.get(pk=after.pk).body == CARD.encode()
    with pytest.raises(UndecodableEvent, match=r"none of the 1 keys .* opens it"):
        bytes(Event.objects.get(pk=before.pk).body)


def test_without_any_key_the_error_names_the_event_and_the_setting(settings):
    event = publish("card.used", CARD)
    settings.KANTHORQ = {}
    with pytest.raises(UndecodableEvent, match=rf"{event.pk} is encrypted.*BODY_KEYS"):
        Event.objects.get(pk=event.pk).json()


def test_a_schedules_body_is_encrypted_and_published_for_its_event():
    planned = schedule(
        "report",
        rrule="FREQ=DAILY",
        dtstart=timezone.now(),
        subject="report.due",
        body={"card": CARD},
        stream="cards",
    )
    with connection.cursor() as cursor:
        cursor.execute("SELECT body FROM kanthorq_django_schedule")
        assert bytes(cursor.fetchone()[0]).startswith(MARK)
    read = Schedule.objects.get(pk=planned.pk)
    assert json.loads(read.body) == {"card": CARD}
    read.refresh_from_db()
    assert json.loads(read.body) == {"card": CARD}
    assert Schedule.objects.publish_due() == 1
    assert Event.objects.get(subject="report.due").json() == {"card": CARD}


def declare(body: str) -> Schedule:
    now = timezone.now()
    return schedule("report", rrule="FREQ=DAILY", dtstart=now, subject="report.due", body=body)


@pytest.fixture
def locked_schedule(settings) -> Schedule:
    """Its body is under a key that is gone."""
    settings.KANTHORQ = {"BODY_KEYS": [OLD]}
    locked = declare(CARD)
    settings.KANTHORQ = {"BODY_KEYS": [NEW]}
    return Schedule.objects.get(pk=locked.pk)


def test_a_schedule_that_no_key_opens_is_cancelled_with_an_error_in_the_log(
    locked_schedule: Schedule, caplog: Any
):
    assert Schedule.objects.publish_due() == 0
    assert Schedule.objects.get().life == "cancelled"
    assert "Schedule report cannot go on and is cancelled" in caplog.text
    assert "none of the 1 keys" in caplog.text


def test_a_schedule_that_no_key_opens_can_be_declared_anew(locked_schedule: Schedule):
    declare("new")
    assert Schedule.objects.get().body == b"new"


def test_the_form_of_a_schedule_that_no_key_opens_says_so(
    locked_schedule: Schedule, admin_client: Client
):
    changed = shown_in(admin_client, locked_schedule) | {"subject": "report.other"}
    response = admin_client.post(page("schedule_change", locked_schedule.pk), changed)
    assert "none of the 1 keys" in str(errors_of(response))
    assert Schedule.objects.get().subject == "report.due"


def test_a_body_put_under_another_event_is_not_opened():
    mine, other = publish("pay.mine", "1 EUR"), publish("pay.other", "1000 EUR")
    put(mine, stored(other))
    with pytest.raises(UndecodableEvent, match="encrypted for another row"):
        Event.objects.get(pk=mine.pk).json()


def test_an_altered_body_is_not_opened():
    event = publish("card.used", CARD)
    put(event, stored(event)[:-4] + b"AAA=")
    with pytest.raises(UndecodableEvent, match="was altered"):
        Event.objects.get(pk=event.pk).json()


def test_a_handler_without_the_key_fails_its_attempt_and_the_event_stays(
    settings, declared: Registry
):
    @subscribe("card.*", consumer="reader", stream="cards", attempt_max=1)
    def read(message):
        message.event.json()

    lost = publish("card.used", CARD, stream="cards")
    settings.KANTHORQ = {"BODY_KEYS": [NEW]}
    kept = publish("card.used", {"number": 1}, stream="cards")
    drain()
    states = dict(Task.objects.values_list("event", "state"))
    assert states == {lost.pk: TaskState.DISCARDED, kept.pk: TaskState.COMPLETED}
    (failure,) = Task.objects.get(event=lost).attempted_errors
    assert failure["error"].startswith("UndecodableEvent: The body of")
    assert Event.objects.filter(pk=lost.pk).exists()


def test_the_same_key_and_body_return_the_stored_event():
    first = publish("card.used", CARD, idempotency_key="one")
    again = publish("card.used", CARD, idempotency_key="one")
    assert (again.pk, again.created) == (first.pk, False)
    assert again.body == CARD.encode()


def test_the_same_key_with_another_body_is_refused():
    publish("card.used", CARD, idempotency_key="one")
    with pytest.raises(IdempotencyConflict):
        publish("card.used", "another", idempotency_key="one")


def test_the_limit_of_a_body_counts_its_plain_bytes(settings):
    settings.KANTHORQ = {"BODY_KEYS": [OLD], "BODY_SIZE_MAX": 10}
    event = publish("card.used", b"x" * 10)
    assert len(stored(event)) > 100
    with pytest.raises(InvalidBody, match="has 11 bytes, the limit is 10"):
        publish("card.used", b"x" * 11)


def test_a_body_that_looks_encrypted_is_refused_and_the_transaction_stays_usable():
    with transaction.atomic():
        with pytest.raises(InvalidBody, match="mark of encrypted bodies"):
            publish("card.used", MARK + b"x")
        publish("card.used", "x")
    assert Event.objects.count() == 1


@pytest.mark.parametrize("given", [["short"], ["not base64 at all" * 3]])
def test_what_is_no_key_is_refused_without_being_shown(settings, given: list[str]):
    settings.KANTHORQ = {"BODY_KEYS": given}
    with pytest.raises(ConfigurationError, match="holds what is no key") as caught:
        publish("card.used", CARD)
    assert given[0] not in str(caught.value)


def test_a_system_check_tells_of_a_wrong_key(settings):
    assert list(check_encryption()) == []
    settings.KANTHORQ = {"BODY_KEYS": [OLD, "wrong"]}
    (told,) = check_encryption()
    assert told.id == "kanthorq_django.E009"
    assert "wrong" not in told.msg


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    fernet.cache_clear()
    with pytest.raises(
        ConfigurationError, match=r"extra .encryption., or pip install cryptography"
    ):
        publish("card.used", CARD)


def test_keys_stay_out_of_what_settings_print():
    from kanthorq_django.conf import get_settings, problems

    assert OLD not in repr(get_settings())
    ((told, _hint),) = problems({"BODY_KEYS": OLD})
    assert OLD not in told


@pytest.fixture
def unsealed(monkeypatch) -> list[bytes]:
    from kanthorq_django.models.publishing import encryption

    opened: list[bytes] = []
    unseal = encryption.unseal

    def counted(owner: UUID, body: bytes) -> bytes:
        opened.append(body)
        return unseal(owner, body)

    monkeypatch.setattr(encryption, "unseal", counted)
    return opened


def test_a_body_that_nobody_reads_is_not_decrypted(unsealed: list[bytes]):
    event = publish("card.used", CARD)
    read = Event.objects.get(pk=event.pk)
    assert (read.subject, unsealed) == ("card.used", [])
    assert read.body == read.body == CARD.encode()
    assert len(unsealed) == 1


def test_two_threads_may_open_a_body_at_once(settings, monkeypatch: pytest.MonkeyPatch):
    """Those of a handler that hands its message to a pool of them."""
    settings.KANTHORQ = {"BODY_KEYS": [Fernet.generate_key().decode()]}
    publish("order.paid", b"plain", stream="orders")
    event = Event.objects.get()
    opened: list[bytes] = []

    def opened_meanwhile(*sealed: Any) -> bytes:
        if not opened:
            opened.append(b"")
            opened.append(event.body)  # what another thread does
        return unseal(*sealed)

    monkeypatch.setattr(encryption, "unseal", opened_meanwhile)
    assert event.body == opened[1] == b"plain"
