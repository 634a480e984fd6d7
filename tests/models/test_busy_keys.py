"""When a key is busy, for whom, and what becomes of a turn that comes too late."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.db.models.functions import Now

from kanthorq_django import publish, publish_many
from kanthorq_django.domain.failures import Failure
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery import claim, lease
from kanthorq_django.models.delivery.turns import Serialize, next_in_turn
from kanthorq_django.models.registration import Registration
from tests.clock import now
from tests.concurrency import elsewhere
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = timedelta(hours=1)
PAST = Now() - timedelta(seconds=1)


@pytest.fixture(params=[Serialize.ON, Serialize.STRICT])
def consumer(request: pytest.FixtureRequest) -> Consumer:
    return ConsumerFactory.create(serialize=request.param.value)


def publish_keys(consumer: Consumer, *keys: str) -> None:
    events = [Event(subject="a.b", resource_key=key) for key in keys]
    publish_many(events, stream=consumer.stream.name)
    assert consumer.pull() == []  # they wait for their turn


def test_a_key_that_is_busy_for_one_consumer_is_free_for_another(consumer: Consumer):
    other = ConsumerFactory.create(serialize=consumer.serialize, stream=consumer.stream)
    publish_keys(consumer, "a")
    assert other.pull() == []
    assert len(other.claim()) == len(consumer.claim()) == 1


def test_a_key_is_busy_as_long_as_one_of_its_group_has_a_lease(consumer: Consumer):
    consumer.turns.group_size = 2
    publish_keys(consumer, "a", "a", "a")
    first, second = consumer.claim()
    consumer.turns.group_size = 1
    Task.objects.filter(pk=first.pk).update(schedule_at=PAST)
    assert consumer.claim() == []
    Task.objects.filter(pk=second.pk).update(schedule_at=PAST)
    assert consumer.claim() == [first]


def test_a_task_for_later_keeps_nothing_behind_it_waiting(consumer: Consumer):
    later = publish("a.b", stream=consumer.stream.name, resource_key="a", schedule_at=now() + HOUR)
    publish_keys(consumer, "a")
    (task,) = consumer.claim()
    assert task.event_id != later.pk


@pytest.mark.parametrize(
    "change",
    [
        lambda: Task.objects.all().cancel(),
        lambda: Task.objects.update(schedule_at=Now() + HOUR),
    ],
    ids=["cancelled", "postponed"],
)
def test_what_is_not_due_any_more_when_its_turn_comes_is_not_leased(
    consumer: Consumer, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch
):
    publish_keys(consumer, "a")

    def too_late(*args: Any) -> list[int]:
        found = next_in_turn(*args)
        elsewhere(change)
        return found

    monkeypatch.setattr(claim, "next_in_turn", too_late)
    assert consumer.claim() == []
    assert not Task.objects.running().exists()


def test_what_is_to_be_cancelled_when_its_turn_comes_takes_one_place(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    Consumer.objects.update(has_cancel_handler=True)
    publish_keys(consumer, "a", "b", "c")
    in_turn = Task.objects.earliest("pk").pk
    Task.objects.all().cancel()
    monkeypatch.setattr(claim, "next_in_turn", lambda *_: [in_turn])
    assert len(consumer.claim(2)) == 2


def test_a_key_that_may_be_busy_yet_keeps_no_other_waiting(consumer: Consumer):
    publish_keys(consumer, "a")
    assert len(consumer.claim()) == 1
    Task.objects.update(schedule_at=PAST)
    publish_keys(consumer, "a", "b")
    consumer.turns.group_size = 10
    with transaction.atomic():
        Task.objects.select_for_update().get(state=TaskState.RUNNING)
        (task,) = elsewhere(consumer.claim)
    assert task.resource_key == "b"


def test_keys_take_turns_also_where_more_is_due_than_is_looked_at(consumer: Consumer):
    publish_keys(consumer, *"abc" * 50)
    served = []
    for _ in range(6):
        (task,) = consumer.claim(1)
        served.append(task.resource_key)
        lease.ack({task.lease: None}, consumer.using)
    assert served == list("abcabc")
    assert {task.resource_key for task in consumer.claim(8)} == set("abc")


def test_what_has_no_key_is_not_stranded_where_its_consumer_begins_to_serialize():
    given = Registration("turns", includes=[">"])
    consumer = Consumer.objects.register("turns", given)
    TaskFactory.create_batch(2, consumer=consumer, resource_key="")
    consumer = Consumer.objects.register("turns", given._replace(serialize="on"))
    assert len(consumer.claim()) == 2


@pytest.mark.parametrize("verb", ["resume", "reset"])
def test_what_has_no_key_is_not_stranded_where_it_begins_again(consumer: Consumer, verb: str):
    ended = TaskFactory.create(consumer=consumer, state=TaskState.CANCELLED, resource_key="")
    getattr(Task.objects.all(), verb)()
    assert consumer.claim() == [ended]


@pytest.mark.parametrize(
    ("serialize", "count"), [(Serialize.ON, 2), (Serialize.STRICT, 1)], ids=["on", "strict"]
)
def test_strictly_what_failed_before_is_a_group_of_its_own(serialize: Serialize, count: int):
    consumer = ConsumerFactory.create(serialize=serialize.value)
    publish_keys(consumer, "a", "a")
    (first,) = consumer.claim()
    lease.nack({first.lease: lease.Failed(Failure("no"), timedelta(0))}, consumer.using)
    consumer.turns.group_size = 2
    tasks = consumer.claim()
    assert (tasks[0], len(tasks)) == (first, count)


def test_no_key_is_looked_at_twice_where_much_is_due(consumer: Consumer):
    publish_keys(consumer, *(f"key-{number:03}" for number in range(150)))
    assert len(set(next_in_turn(consumer, 10))) == 10


def test_who_could_not_look_for_turns_does_not_believe_that_all_were_given(consumer: Consumer):
    publish_keys(consumer, "a")
    with transaction.atomic():
        Consumer.objects.select_for_update().get(pk=consumer.pk)  # as another worker does
        assert elsewhere(consumer.claim) == []
    assert not consumer.turns.were_all_given
    assert len(consumer.claim()) == 1
    assert consumer.turns.were_all_given


def test_who_did_not_look_for_turns_does_not_believe_that_all_were_given(consumer: Consumer):
    assert consumer.claim() == []
    assert consumer.turns.were_all_given
    publish_keys(consumer, "a")
    TaskFactory.create(consumer=consumer, schedule_at=PAST)
    consumer.turns.claim_count = 0  # the single place is that of what waits for no turn
    (task,) = consumer.claim(1)
    assert task.resource_key == ""
    assert not consumer.turns.were_all_given


def test_who_gave_as_many_turns_as_there_was_room_for_does_not_believe_that_all_were_given(
    consumer: Consumer,
):
    publish_keys(consumer, *"abcdef")
    assert len(consumer.claim(4)) == 3  # a part is kept for what waits for no turn
    assert not consumer.turns.were_all_given


def test_every_other_single_place_is_for_what_waits_for_no_turn(consumer: Consumer):
    publish_keys(consumer, *"abcd")
    TaskFactory.create_batch(4, consumer=consumer, schedule_at=PAST)
    served = [task.resource_key for _ in range(4) for task in consumer.claim(1)]
    assert served.count("") == 2


def test_keys_behind_many_that_are_busy_come_to_their_turn(consumer: Consumer):
    keys, free = [f"key-{number:03}" for number in range(250)], ["key-005", "key-105", "key-205"]
    publish_keys(consumer, *keys)
    busy = Task.objects.exclude(resource_key__in=free)
    busy.update(state=TaskState.RUNNING, schedule_at=Now() + HOUR)
    publish_keys(consumer, *keys)  # as much is due of busy keys as is looked at
    looks = [set(next_in_turn(consumer, 10)) for _ in free]
    found = Task.objects.filter(pk__in=set.union(*looks)).values_list("resource_key", flat=True)
    assert set(found) == set(free)
