import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

import pytest
from django.db import OperationalError, connections, transaction
from django.db.models import Count
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from kanthorq_django import publish_many
from kanthorq_django.domain.failures import Failure
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery import claim, lease
from kanthorq_django.models.delivery.cursor import NO_FLOOR
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX
from kanthorq_django.models.delivery.turns import Serialize, next_in_turn, turns_locked
from kanthorq_django.models.registration import Registration
from tests.concurrency import elsewhere
from tests.factories import ConsumerFactory

pytestmark = pytest.mark.django_db(transaction=True)


def publish_keys(consumer: Consumer, *keys: str) -> list[Event]:
    events = [Event(subject="a.b", resource_key=key) for key in keys]
    published = publish_many(events, stream=consumer.stream.name)
    while consumer.pull_page(1_000).tasks or not consumer.pull_page(1_000).is_idle:
        pass
    return published


def claimed(consumer: Consumer, limit: int = 100) -> list[Task]:
    return consumer.claim(limit)


def events_of(tasks: list[Task]) -> list[object]:
    return [task.event_id for task in tasks]


def index_scans() -> int:
    """Return how often this transaction has gone through an index of tasks."""
    with connections["default"].cursor() as cursor:
        cursor.execute(
            "SELECT idx_scan FROM pg_stat_xact_user_tables WHERE relname = 'kanthorq_django_task'"
        )
        (count,) = cursor.fetchone()
    return int(count)


@pytest.fixture(params=[Serialize.ON, Serialize.STRICT])
def consumer(request) -> Consumer:
    return ConsumerFactory.create(serialize=request.param.value)


def test_one_task_of_a_key_is_leased_at_a_time_in_order_of_publishing(consumer):
    first, second, third = publish_keys(consumer, "a", "a", "a")

    for expected in (first, second, third):
        (task,) = claimed(consumer)
        assert task.event_id == expected.pk
        assert claimed(consumer) == []
        lease.ack({task.lease: None}, consumer.using)
    assert claimed(consumer) == []


def test_keys_do_not_wait_for_each_other(consumer):
    a, _, b, c = publish_keys(consumer, "a", "a", "b", "c")
    assert events_of(claimed(consumer)) == [a.pk, b.pk, c.pk]


def test_tasks_without_a_key_are_not_serialized(consumer):
    publish_keys(consumer, "", "", "")
    # They need no turn: the pull has leased them all.
    assert Task.objects.filter(consumer=consumer).running().count() == 3


@pytest.mark.parametrize(("serialize", "passes"), [(Serialize.ON, True), (Serialize.STRICT, False)])
def test_a_task_that_waits_for_its_retry_is_passed_unless_strictly(serialize, passes):
    consumer = ConsumerFactory.create(serialize=serialize.value)
    _, second = publish_keys(consumer, "a", "a")
    (task,) = claimed(consumer)
    lease.nack({task.lease: lease.Failed(Failure("no"), timedelta(minutes=5))}, consumer.using)

    assert events_of(claimed(consumer)) == ([second.pk] if passes else [])


def test_a_discarded_task_does_not_wedge_its_key(consumer):
    _, second = publish_keys(consumer, "a", "a")
    (task,) = claimed(consumer)
    lease.nack({task.lease: lease.Failed(Failure("never"), is_final=True)}, consumer.using)
    assert events_of(claimed(consumer)) == [second.pk]


def test_a_lease_that_runs_out_frees_its_key(consumer):
    first, _ = publish_keys(consumer, "a", "a")
    claimed(consumer)
    Task.objects.running().update(schedule_at=Now() - timedelta(seconds=1))

    (again,) = claimed(consumer)
    assert (again.event_id, again.attempt_count) == (first.pk, 2)
    assert claimed(consumer) == []


def test_a_retry_that_comes_due_waits_for_the_one_that_runs():
    consumer = ConsumerFactory.create(serialize=Serialize.ON.value)
    first, _second = publish_keys(consumer, "a", "a")
    (task,) = claimed(consumer)
    lease.nack({task.lease: lease.Failed(Failure("no"), timedelta(minutes=5))}, consumer.using)
    (running,) = claimed(consumer)
    Task.objects.retryable().update(schedule_at=Now())
    assert claimed(consumer) == []

    lease.ack({running.lease: None}, consumer.using)
    assert events_of(claimed(consumer)) == [first.pk]


def test_keys_take_turns_when_there_is_little_room(consumer):
    publish_keys(consumer, *"abcabcabc")
    served = []
    for _ in range(9):
        (task,) = claimed(consumer, 1)
        served.append(task.resource_key)
        lease.ack({task.lease: None}, consumer.using)
    assert served == list("abcabcabc")


@pytest.mark.parametrize(
    ("keys", "tasks_per_key"),
    [(150, 1), (150, 2), (600, 2), (150, 12)],
    ids=["few are due", "many are due", "many keys are due", "too many are due to read them"],
)
def test_a_ready_task_is_found_behind_many_busy_keys(consumer, keys, tasks_per_key):
    publish_keys(consumer, *[f"busy-{number:03}" for number in range(keys)] * tasks_per_key)
    while claimed(consumer):
        pass
    (ready,) = publish_keys(consumer, "ready")
    consumer.turns.served_key = ""
    assert events_of(claimed(consumer, 10)) == [ready.pk]


def test_the_keys_of_tasks_for_later_are_not_gone_through(consumer):
    ready, *_ = publish_keys(consumer, "ready", *(f"later-{number:03}" for number in range(450)))
    later = Task.objects.exclude(event=ready)
    later.update(schedule_at=Now() + timedelta(days=1))
    with CaptureQueriesContext(connections["default"]) as captured:
        assert events_of(claimed(consumer, 10)) == [ready.pk]
        assert claimed(consumer, 10) == []
    looks = [query for query in captured if "Whose turn is it" in query["sql"]]
    assert len(looks) == 2


@pytest.mark.parametrize("due_count", [300, 3_000])
def test_nor_are_they_where_one_key_has_a_backlog_and_no_turn(consumer, due_count):
    later_keys = [f"later-{number:04}" for number in range(5_000)]
    publish_keys(consumer, *later_keys)
    Task.objects.update(schedule_at=Now() + timedelta(days=1))
    publish_keys(consumer, *["backlog"] * due_count)
    (first,) = claimed(consumer)
    if consumer.serialize == Serialize.STRICT:
        failed = lease.Failed(Failure("no"), timedelta(minutes=5))
        lease.nack({first.lease: failed}, consumer.using)
    (ready,) = publish_keys(consumer, "ready")
    for expected in ([ready.pk], []):
        with transaction.atomic():
            before = index_scans()
            assert events_of(claimed(consumer, 10)) == expected
            assert index_scans() - before < len(later_keys)


def test_no_more_groups_are_leased_than_calls_are_wanted(consumer):
    publish_keys(consumer, *(f"key-{number}" for number in range(20)))
    consumer.turns.group_size = 10
    assert len(claimed(consumer, 40)) == 3
    assert len(claimed(consumer, 40)) == 3


def test_a_group_is_all_of_one_key_in_order(consumer):
    events = publish_keys(consumer, "a", "b", "a", "b", "a")
    consumer.turns.group_size = 10
    tasks = claimed(consumer)
    by_key = {key: [t.event_id for t in tasks if t.resource_key == key] for key in "ab"}
    assert by_key["a"] == [events[0].pk, events[2].pk, events[4].pk]
    assert by_key["b"] == [events[1].pk, events[3].pk]
    assert claimed(consumer) == []


def test_cancelling_tasks_need_no_turn(consumer):
    Consumer.objects.filter(pk=consumer.pk).update(has_cancel_handler=True)
    publish_keys(consumer, "a", "a")
    claimed(consumer)
    Task.objects.available().cancel()
    (task,) = claimed(consumer)
    assert task.state == TaskState.CANCELLING


def test_a_consumer_that_ceases_to_serialize_strands_nothing():
    given = Registration(stream="turns", includes=[">"], serialize="on")
    consumer = Consumer.objects.register("turns", given)
    publish_keys(consumer, "a", "a", "a")
    consumer = Consumer.objects.register("turns", given._replace(serialize=""))
    assert len(claimed(consumer)) == 3

    Task.objects.all().update(state=TaskState.AVAILABLE, schedule_at=Now())
    consumer = Consumer.objects.register("turns", given)
    assert len(claimed(consumer)) == 1


@pytest.mark.parametrize(
    "chosen",
    [
        Consumer.objects.alias(task_count=Count("tasks")).filter(task_count=3),
        Consumer.objects.filter(tasks__resource_key="a").distinct(),
        Consumer.objects.select_for_update(),
    ],
)
def test_tasks_follow_an_update_of_consumers_that_sql_cannot_lock_as_they_were_chosen(chosen):
    consumer = ConsumerFactory.create(serialize="")
    publish_keys(consumer, "a", "a", "a")
    Task.objects.update(state=TaskState.AVAILABLE, schedule_at=Now())
    assert chosen.all().update(serialize="on") == 1
    consumer.refresh_from_db()
    assert len(claimed(consumer)) == 1


def test_an_update_of_a_slice_is_refused_in_the_words_of_django():
    with pytest.raises(TypeError, match="Cannot update a query once a slice has been taken"):
        Consumer.objects.all()[:1].update(serialize="on")


def test_an_update_of_one_consumer_of_each_stream_is_refused():
    consumer = ConsumerFactory.create(serialize="")
    ConsumerFactory.create(stream=consumer.stream, serialize="")
    chosen = Consumer.objects.order_by("stream").distinct("stream")
    for changes in ({"serialize": "on"}, {"attempt_max": 3}):
        with pytest.raises(TypeError, match=r"Cannot call update\(\) after .distinct\(\*fields\)"):
            chosen.update(**changes)
    assert Consumer.objects.filter(serialize="").count() == 2


def test_what_is_over_is_not_written_anew_where_its_consumer_ceases_to_serialize(consumer):
    """There may be millions; what begins again goes by the rule of then."""
    publish_keys(consumer, "k")
    Task.objects.update(state=TaskState.COMPLETED, finalized_at=Now())

    Consumer.objects.update(serialize=Serialize.OFF)

    assert Task.objects.get().turn_key == "k"


def test_a_registration_that_fails_half_way_changes_nothing_so_that_the_next_one_strands_nothing():
    given = Registration(stream="turns", includes=[">"], serialize="on")
    consumer = Consumer.objects.register("turns", given)
    publish_keys(consumer, "a", "a", "a")

    def register_in_a_hurry() -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute("SET lock_timeout = '50ms'")
        Consumer.objects.register("turns", given._replace(serialize=""))

    with transaction.atomic():
        list(Task.objects.select_for_update(of=("self",)))
        with pytest.raises(OperationalError):
            elsewhere(register_in_a_hurry)

    consumer = Consumer.objects.register("turns", given._replace(serialize=""))
    assert len(claimed(consumer)) == 3


@pytest.mark.parametrize("verb", ["resume", "reset"])
def test_a_task_that_ended_under_another_rule_runs_again_under_the_present_one(verb):
    given = Registration(stream="turns", includes=[">"], serialize="on")
    consumer = Consumer.objects.register("turns", given)
    publish_keys(consumer, "a", "a")
    Task.objects.all().cancel()

    consumer = Consumer.objects.register("turns", given._replace(serialize=""))
    getattr(Task.objects.all(), verb)()
    assert len(claimed(consumer)) == 2  # nothing is stranded

    lease.ack({task.lease: None for task in Task.objects.all()}, consumer.using)
    consumer = Consumer.objects.register("turns", given)
    Task.objects.all().reset()
    assert len(claimed(consumer)) == 1  # and nothing runs side by side


def test_two_workers_that_see_different_moments_do_not_both_serve_a_key():
    """One picks the second task while the first waits for its retry, which then comes due."""
    consumer = ConsumerFactory.create(serialize=Serialize.ON.value)
    publish_keys(consumer, "a", "a")
    (first,) = claimed(consumer)
    lease.nack({first.lease: lease.Failed(Failure("no"), timedelta(minutes=5))}, consumer.using)
    has_picked, may_go_on = threading.Event(), threading.Event()

    def pick_and_claim() -> None:
        mine = Consumer.objects.get(pk=consumer.pk)
        with turns_locked(mine) as is_ours:
            picked = next_in_turn(mine, 10) if is_ours else []
            has_picked.set()
            assert may_go_on.wait(10)
            states = [TaskState.AVAILABLE, TaskState.RETRYABLE]
            claim._claim(mine, 10, claim._Wanted(states, NO_FLOOR, BODIES_SIZE_MAX), picked)
        connections.close_all()

    other = threading.Thread(target=pick_and_claim, daemon=True)
    other.start()
    assert has_picked.wait(10)
    Task.objects.retryable().update(schedule_at=Now())
    assert claimed(consumer) == []
    may_go_on.set()
    other.join(10)
    assert Task.objects.running().count() == 1


class Hands:
    """Who holds a key at this moment, told by the workers themselves."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: Counter[str] = Counter()
        self.overlaps = 0

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        with self._guard:
            self._held[key] += 1
            self.overlaps += self._held[key] > 1
        yield
        with self._guard:
            self._held[key] -= 1


@pytest.mark.parametrize("key_count", [1, 5])
def test_no_two_workers_ever_hold_the_same_key(key_count):
    consumer = ConsumerFactory.create(serialize=Serialize.ON.value)
    events = publish_keys(consumer, *(f"key-{number % key_count}" for number in range(40)))
    hands = Hands()
    done: list[UUID] = []

    def work() -> None:
        mine = Consumer.objects.get(pk=consumer.pk)
        while len(done) < len(events):
            for task in mine.claim(3):
                with hands.holding(task.resource_key):
                    task.refresh_from_db()  # a round trip in which others may claim
                lease.ack({task.lease: None}, mine.using)
                done.append(task.event_id)
        connections.close_all()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert hands.overlaps == 0
    assert sorted(done) == sorted(event.pk for event in events)


def test_a_lease_that_ran_out_is_claimed_anew_before_its_key_serves_another():
    consumer = ConsumerFactory.create(serialize=Serialize.ON.value)
    publish_keys(consumer, "a", "a")
    (first,) = claimed(consumer)
    lease.nack({first.lease: lease.Failed(Failure("no"), timedelta(minutes=5))}, consumer.using)
    (late,) = claimed(consumer)
    Task.objects.all().update(schedule_at=Now() - timedelta(seconds=1))
    (again,) = claimed(consumer)
    assert again.pk == late.pk  # which fences its old holder

    (row,) = lease.renew({late.lease: timedelta(minutes=1)}, consumer.using).values()
    assert (row.is_renewed, row.is_ours) == (False, False)
    with pytest.raises(LeaseLost):
        Message(late).extend(timedelta(minutes=1))
    assert list(Task.objects.running().filter(schedule_at__gt=Now())) == [again]


def test_a_group_that_is_cut_short_begins_with_the_lease_that_ran_out():
    consumer = ConsumerFactory.create(serialize=Serialize.ON.value)
    publish_keys(consumer, "a", "a")
    (first,) = claimed(consumer)
    lease.nack({first.lease: lease.Failed(Failure("no"), timedelta(minutes=5))}, consumer.using)
    (late,) = claimed(consumer)
    Task.objects.all().update(schedule_at=Now() - timedelta(seconds=1))

    consumer = Consumer.objects.get(pk=consumer.pk)
    consumer.turns.group_size = 2
    assert events_of(claimed(consumer, 1)) == [late.event_id]


@pytest.fixture
def stuck() -> Consumer:
    """A consumer whose tasks are grouped; the lease of one ran out, another of its key is new."""
    consumer = ConsumerFactory.create(serialize=Serialize.ON.value)
    consumer.turns.group_size = 10
    publish_keys(consumer, "a")
    assert len(claimed(consumer)) == 1
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))
    publish_keys(consumer, "a")
    return consumer


def test_nothing_of_a_group_is_leased_while_one_that_may_run_yet_is_locked(
    stuck: Consumer,
):
    with transaction.atomic():
        Task.objects.select_for_update().get(state=TaskState.RUNNING)
        assert elsewhere(lambda: claimed(stuck)) == []
    assert len(claimed(stuck)) == 2


def test_a_lease_that_ran_out_is_claimed_anew_while_another_of_its_group_is_locked(
    stuck: Consumer,
):
    late = Task.objects.get(state=TaskState.RUNNING)
    with transaction.atomic():
        Task.objects.select_for_update().get(state=TaskState.AVAILABLE)
        assert elsewhere(lambda: claimed(stuck)) == [late]


def test_nothing_of_a_group_is_leased_while_one_that_may_run_yet_is_not_wanted(
    stuck: Consumer,
):
    assert stuck.claim(states=[TaskState.AVAILABLE]) == []
    assert len(claimed(stuck)) == 2


def test_keys_whose_groups_are_more_than_there_is_room_for_are_served_next():
    consumer = ConsumerFactory.create(serialize=Serialize.ON.value)
    consumer.turns.group_size = 2
    publish_keys(consumer, *"aabbccdd" * 2)
    served = []
    for _ in range(3):
        tasks = claimed(consumer, 4)  # finds one group, and the first task of the next one
        served.append("".join(task.resource_key for task in tasks))
        lease.ack({task.lease: None for task in tasks}, consumer.using)
    assert served == ["aa", "bb", "cc"]


def test_a_walk_that_begins_again_finds_nothing_twice(consumer):
    publish_keys(consumer, "b", "c")
    consumer.turns.served_key = "a"
    found = next_in_turn(consumer, 10)
    assert len(found) == len(set(found)) == 2
