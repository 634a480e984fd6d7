"""Events that come by dumpdata and loaddata instead of publish()."""

import json

import pytest
from django.core import serializers

from kanthorq_django import publish
from kanthorq_django.models import Event, Task
from tests.factories import ConsumerFactory, StreamFactory

pytestmark = pytest.mark.django_db(transaction=True)


def load(dump: str) -> None:
    for loaded in serializers.deserialize("json", dump):
        loaded.save()


def test_an_event_from_a_fixture_is_new_to_a_consumer_that_has_read_the_stream() -> None:
    stream = StreamFactory.create()
    consumer = ConsumerFactory.create(stream=stream)
    first = publish("order.paid", {"total": 3}, stream=stream.name, metadata={"trace": "1f"})
    dump = serializers.serialize("json", [first])
    Event.objects.all().delete()
    publish("order.sent", stream=stream.name)
    assert [task.event.subject for task in consumer.pull()] == ["order.sent"]

    load(dump)

    (task,) = consumer.pull()
    assert task.event == first
    assert task.event.json() == {"total": 3}
    assert Event.objects.get(pk=first.pk).metadata == {"trace": "1f"}
    assert Event.objects.get(pk=first.pk).xid != first.xid


def test_an_event_that_is_loaded_again_makes_no_second_task() -> None:
    stream = StreamFactory.create()
    consumer = ConsumerFactory.create(stream=stream)
    event = publish("order.paid", stream=stream.name)
    dump = serializers.serialize("json", [event])
    assert len(consumer.pull()) == 1
    load(dump)
    assert consumer.pull() == []
    assert Event.objects.count() == Task.objects.count() == 1


def test_a_fixture_names_no_transaction() -> None:
    (dumped,) = json.loads(serializers.serialize("json", [publish("order.paid")]))
    assert "xid" not in dumped["fields"]
    assert dumped["fields"]["subject"] == "order.paid"
