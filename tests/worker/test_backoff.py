import logging

import pytest
from django.db import OperationalError

from kanthorq_django.worker.backoff import Backoff


def test_waits_double_up_to_the_longest_and_are_never_alike():
    backoff = Backoff("puller", first=1, longest=6)
    waits = [backoff.failed(OperationalError("away")) for _ in range(6)]

    for wait, most in zip(waits, (1, 2, 4, 6, 6, 6), strict=True):
        assert most / 2 <= wait <= most
    assert len(set(waits)) == 6
    backoff.succeeded()
    assert backoff.failed(OperationalError("away")) <= 1


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture):
    backoff = Backoff("puller")
    with caplog.at_level(logging.INFO):
        backoff.succeeded()
        for _ in range(5):
            backoff.failed(OperationalError("connection refused\n\tIs it running?"))
        backoff.succeeded()
        backoff.succeeded()

    assert [record.message for record in caplog.records] == [
        "puller interrupted, trying again: connection refused Is it running?",
        "puller works again",
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert not caplog.records[0].exc_info


def test_a_defect_is_told_with_its_traceback(caplog: pytest.LogCaptureFixture):
    Backoff("puller").failed(ZeroDivisionError())

    assert caplog.records[0].exc_info
