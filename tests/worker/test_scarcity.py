"""When threads of a worker share connections, because there are not enough for all."""

import math
from typing import Any

import pytest
from django.db import OperationalError, connection

from kanthorq_django.worker.connections import scarcity
from kanthorq_django.worker.connections.scarcity import (
    OWN_THREADS,
    are_scarce,
    expect_small_pools,
    note_refused_connection,
    pool_size,
)

pytestmark = pytest.mark.django_db

CONCURRENCY = 10


@pytest.fixture(autouse=True)
def unrefused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scarcity, "_refused_at", -math.inf)


def pool_of(pool: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict["OPTIONS"], "pool", pool)


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        (None, math.inf),
        (False, math.inf),
        ({}, math.inf),  # which Django takes for none
        (True, 4),
        ({"timeout": 5}, 4),
        ({"min_size": 7}, 7),
        ({"min_size": 1, "max_size": 20}, 20),
        ({"min_size": 9, "max_size": None}, 9),
    ],
)
def test_a_pool_has_as_many_connections_as_its_options_say(
    pool: object, size: float, monkeypatch: pytest.MonkeyPatch
):
    pool_of(pool, monkeypatch)
    assert pool_size(connection) == size


@pytest.mark.parametrize(("missing", "is_small"), [(0, False), (1, True)])
def test_a_pool_with_a_connection_less_than_there_are_threads_is_shared_from_the_start(
    missing: int, is_small: bool, monkeypatch: pytest.MonkeyPatch
):
    pool_of({"max_size": CONCURRENCY + OWN_THREADS - missing}, monkeypatch)
    expect_small_pools(CONCURRENCY)
    assert are_scarce() is is_small


def test_what_a_small_pool_refuses_does_not_make_it_larger_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
):
    pool_of({"max_size": 2}, monkeypatch)
    expect_small_pools(CONCURRENCY)
    note_refused_connection(OperationalError("couldn't get a connection after 30.00 sec"))
    monkeypatch.setattr(scarcity, "SCARCE_FOR", 0.0)  # it is over at once
    assert are_scarce()


@pytest.mark.parametrize(
    ("error", "is_refusal"),
    [
        (OperationalError("FATAL: sorry, too many clients already"), True),
        (OperationalError("remaining connection slots are reserved for roles"), True),
        (OperationalError("no more connections allowed (max_client_conn)"), True),
        (OperationalError("couldn't get a connection after 30.00 sec"), True),
        (OperationalError("the connection is closed"), False),
        (ValueError("too many clients"), False),
        (None, False),
    ],
)
def test_only_a_refused_connection_makes_connections_scarce(error: Any, is_refusal: bool):
    note_refused_connection(error)
    assert are_scarce() is is_refusal
