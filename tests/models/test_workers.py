"""The rows by which operators see who is alive."""

from datetime import timedelta

import pytest
from django.db.models.functions import Now

from kanthorq_django.models import Worker

pytestmark = pytest.mark.django_db


def signed_in() -> Worker:
    return Worker.objects.create(host="here", pid=7, concurrency=3, consumers=["refunds"])


def test_a_worker_that_is_seen_is_alive():
    worker = signed_in()
    Worker.objects.update(seen_at=Now() - timedelta(minutes=5))
    assert list(Worker.objects.dead()) == [worker]
    worker.see()
    assert list(Worker.objects.alive()) == [worker]


def test_a_row_that_a_crash_took_back_is_written_again():
    worker = signed_in()
    Worker.objects.all().delete()
    worker.see()
    written = Worker.objects.alive().get()
    assert (written.pk, written.pid, written.consumers) == (worker.pk, 7, ["refunds"])
