"""How events of open transactions are looked for where one transaction published all there is."""

import json
from datetime import timedelta

import pytest
from django.db import transaction

from kanthorq_django import sql
from kanthorq_django.models import Consumer
from kanthorq_django.models.delivery.cursor import NO_FLOOR
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX
from kanthorq_django.models.registration import Registration
from tests.models.test_pull_plan import Scan, event_scans, execute, place

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def reader() -> Consumer:
    """A consumer that has read a bulk of events while another transaction was open."""
    consumer = Consumer.objects.register("reader", Registration("bulk", includes=[">"]))
    execute(
        f"""
        INSERT INTO kanthorq_django_event (id, stream_id, subject, body, metadata, resource_key)
        SELECT lpad(to_hex(n), 32, '0')::uuid, {consumer.stream_id}, 'a.b', '', '{{}}', ''
        FROM generate_series(1, 60000) AS n  -- enough for the indexes to differ in height
        """  # noqa: S608  # a number of this test
    )
    execute("ANALYZE kanthorq_django_event")
    latest = "pg_snapshot_xmax(pg_current_snapshot())"
    place(consumer, f"format('9:%s:9', {latest})::pg_snapshot")
    return consumer


def assert_probes(scans: list[Scan]) -> None:
    """The planner trap: any order seems as good as the index's where all rows seem to fit."""
    assert any(scan.blocks for scan in scans), "nothing was looked at"
    assert sum(scan.rows_removed for scan in scans) == 0


def test_a_look_probes_the_index(reader: Consumer):
    params = {"consumer_ids": [reader.pk], "floors": [NO_FLOOR], "states": [1]}
    assert_probes(event_scans(sql.load("peek"), {**params, "horizon": timedelta(0)}))


def test_a_pull_probes_the_index(reader: Consumer):
    params = {
        "limit": 100,
        "size_max": BODIES_SIZE_MAX,
        "page_size": 500,
        "includes": "^$",
        "excludes": "^$",
    }
    filters = ("subject_includes", "subject_excludes")
    params |= {name: json.dumps(getattr(reader, name)) for name in filters}
    params |= {"consumer_id": reader.pk, "visibility_timeout": reader.visibility_timeout}
    with transaction.atomic():  # in which the note stays that the consumer is locked
        sql.rows("default", "lock_consumer", {"consumer_id": reader.pk})
        assert_probes(event_scans(sql.load("pull"), params))
