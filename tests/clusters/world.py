"""A database in full swing, and what each of its consumers must get, once."""

from dataclasses import dataclass, field
from uuid import UUID

from django.db import connections, transaction
from django.utils import timezone

from kanthorq_django import publish, publish_many
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.registration import Registration
from tests.clusters.throwaway import database_alias

STREAM = "orders"


@dataclass
class World:
    """Consumers of every kind in the database ``using``, and the event ids that each is owed."""

    using: str
    owed: dict[str, set[UUID]] = field(default_factory=dict)

    def register(self, name: str, *includes: str, **given: object) -> Consumer:
        registration = Registration(STREAM, includes or [">"], **given)  # type: ignore[arg-type]
        self.owed.setdefault(name, set())
        return Consumer.objects.using(self.using).register(name, registration)

    def consumer(self, name: str) -> Consumer:
        return Consumer.objects.using(self.using).get(name=name)

    def publish(self, subject: str = "order.paid", *, using: str = "") -> UUID:
        return publish(subject, stream=STREAM, using=using or self.using).id

    def publish_many_kinds(self) -> set[UUID]:
        """Publish alone, in savepoints, and many at once; return the ids."""
        ids = {self.publish(), self.publish("order.refunded")}
        with transaction.atomic(using=self.using):
            ids.add(self.publish())
            with transaction.atomic(using=self.using):
                ids.add(self.publish())
        with transaction.atomic(using=self.using), transaction.atomic(using=self.using):
            ids.add(self.publish())
        many = [Event(subject="order.paid") for _ in range(3)]
        return ids | {event.id for event in publish_many(many, stream=STREAM, using=self.using)}

    def owe(self, events: set[UUID], *, excepted: tuple[str, ...] = ()) -> None:
        """Note that everybody is owed ``events``, as far as they are selected."""
        for name in self.owed.keys() - set(excepted):
            self.owed[name] = self.owed[name] | events
        self.owed["refunds"] &= self.event_ids(subject="order.refunded")

    def event_ids(self, **conditions: object) -> set[UUID]:
        found = Event.objects.using(self.using).filter(**conditions)
        return set(found.values_list("id", flat=True))

    def handle_all(self) -> None:
        """Do what workers would, until nothing is left."""
        for name in self.owed:
            consumer = self.consumer(name)
            while tasks := consumer.pull(3) + consumer.claim(50):
                for task in tasks:
                    Message(task).ack()

    def check(self) -> None:
        """Assert that every event has exactly one task of everybody who is owed it."""
        for name, owed in self.owed.items():
            tasks = Task.objects.using(self.using).filter(consumer__name=name)
            delivered = list(tasks.values_list("event_id", flat=True))
            assert set(delivered) == owed, name
            assert len(delivered) == len(owed), name
        again = Task.objects.using(self.using).filter(attempt_count__gt=1)
        assert not again.exists(), "something that was done has been repeated"


def world_in_full_swing(using: str) -> World:
    """Return a world in which much is read, some of it done, some unread, and a window open."""
    world = World(using)
    for name, filters in (("all", ">"), ("refunds", "order.refunded"), ("refiltered", "nothing")):
        world.register(name, filters)
    world.register("windowed")
    world.register("parked", parked=True)
    _publish_and_read(world)
    world.register("dated", deliver=timezone.now())
    world.register("refiltered", ">")
    world.register("untouched")
    world.owe(world.publish_many_kinds())
    for task in Task.objects.using(using).filter(consumer__name="all"):
        Message(task).ack()
    return world


def _publish_and_read(world: World) -> None:
    """Let consumers read while one transaction that publishes is open."""
    settings = connections[world.using].settings_dict
    with database_alias(f"{world.using}_late", **settings) as late, transaction.atomic(late):
        straddling = world.publish(using=late)
        first = world.publish_many_kinds()
        world.register("new", deliver="new")
        second = world.publish_many_kinds()
        for name in ("all", "refunds", "new", "parked", "refiltered"):
            read_all(world.consumer(name))
        world.consumer("windowed").pull(3)
    world.owed["dated"] = world.owed["untouched"] = set()
    world.owe({straddling}, excepted=("dated",))
    world.owe(second, excepted=("dated", "refiltered"))
    world.owe(first, excepted=("dated", "refiltered", "new"))


def read_all(consumer: Consumer) -> None:
    while not consumer.pull_page(100).is_idle:
        pass
