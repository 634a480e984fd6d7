"""The rows by which operators see who is alive."""

from datetime import timedelta

import pytest
from django.db import OperationalError, transaction
from django.db.models.functions import Now

from kanthorq_django.models import Worker
from tests.concurrency import elsewhere

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


@pytest.mark.django_db(transaction=True)
def test_who_notes_that_a_worker_is_alive_waits_for_no_lock():
    """Renewals would wait as well, and leases run out; so would the end of a worker."""
    worker = signed_in()
    Worker.objects.update(seen_at=Now() - timedelta(minutes=5))
    with transaction.atomic():
        Worker.objects.select_for_update().get()
        elsewhere(worker.see)  # it is noted the next time
        with pytest.raises(OperationalError):
            elsewhere(worker.sign_out)
    assert list(Worker.objects.dead()) == [worker]
    worker.see()
    assert list(Worker.objects.alive()) == [worker]
