"""Networks that fall silent, reset, delay, partition, and lose the answer that counts."""

import json
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from project.postgres.cluster import PORT
from tests.faults.cable import network
from tests.faults.stage import LEASE_SECONDS, Stage
from tests.proxy import Proxy
from tests.quick_run import sooner

LOOPBACK = "127.0.0.1"
HEALED_WITHIN = 60.0  # seconds in which a half-open connection is found out
# The same limits as in production, made shorter: what is cut after 25 seconds, after one.
IMPATIENT = {
    "kanthorq_django.worker.warden.CANCEL_AFTER": 0.7,
    "kanthorq_django.worker.warden.CUT_AFTER": 1.0,
}


@pytest.fixture
def proxy(stage: Stage) -> Iterator[Proxy]:
    with Proxy((str(stage.server.socket_dir), PORT), LOOPBACK) as proxy:
        yield proxy


def url_of(stage: Stage, proxy: Proxy) -> str:
    return stage.view.url(proxy.host, proxy.port)


@pytest.mark.slow
@pytest.mark.parametrize("limits", [IMPATIENT, {}])
def test_connections_that_fall_silent_are_found_out_and_replaced(
    stage: Stage, proxy: Proxy, limits: dict[str, float]
):
    stage.consumers = ["plain", "coroutine"]
    worker = stage.worker(url=url_of(stage, proxy), FAULTS_SET=json.dumps(limits))
    client = stage.client()
    stage.wait_until_started()
    client.do("both 10")
    proxy.freeze()
    client.do("both 5")

    seconds = stage.settle(2 * HEALED_WITHIN)

    assert seconds < HEALED_WITHIN
    if not limits:
        stage.record("connections are half-open: everything handled", seconds=seconds)
    assert worker.is_running
    stage.stop()
    proxy.cut()  # the server's ends of what fell silent, which only its keepalives would find
    stage.check()


SOON = {"kanthorq_django.worker.connections.probe.PROBE_EVERY": 0.7}


@pytest.mark.parametrize("limits", sooner([SOON, {}], SOON))
@pytest.mark.parametrize("statement", ["Insert a consumer", "kanthorq_django_worker"])
def test_a_worker_whose_start_gets_no_answer_ends_with_a_sentence(
    stage: Stage, proxy: Proxy, statement: str, limits: dict[str, float]
):
    """Whoever has started it starts it again; until then others do its work."""
    happened = proxy.swallow(statement)
    worker = stage.worker(url=url_of(stage, proxy), FAULTS_SET=json.dumps(limits))
    stage.wait_until(happened.is_set)
    began = time.monotonic()

    assert worker.wait() == 1

    if not limits:
        stage.record("a start gets no answer: ended", seconds=time.monotonic() - began)
    assert "Traceback" not in worker.text
    proxy.cut()
    stage.worker()
    stage.client().do("both 5")
    stage.settle()
    stage.check()


def test_handlers_whose_connections_fall_silent_are_found_out_too(stage: Stage, proxy: Proxy):
    """Nothing that a handler asks has a limit of time, and its lease is renewed all the while."""
    stage.worker(url=url_of(stage, proxy), FAULTS_SET=json.dumps(IMPATIENT | SOON))
    client = stage.client()
    stage.wait_until_started()
    client.begin("both 40")
    stage.wait_until(lambda: len(stage.view.tasks()) > 20)
    proxy.freeze()
    proxy.abandon()
    client.wait()

    seconds = stage.settle()

    stage.record("handlers' connections are half-open: everything handled", seconds=seconds)
    stage.check()


def test_coroutines_whose_connections_fall_silent_are_found_out_too(stage: Stage, proxy: Proxy):
    """One connection serves all of them, and a thread beside the loop has its own."""
    stage.consumers = ["awaiting"]
    worker = stage.worker(url=url_of(stage, proxy), FAULTS_SET=json.dumps(IMPATIENT | SOON))
    client = stage.client()
    stage.wait_until_started()
    has_asked = proxy.swallow('INTO "ledger_entry"')  # else nobody might wait for an answer
    client.begin("both 80")
    stage.wait_until(has_asked.is_set)
    proxy.freeze()
    proxy.abandon()
    client.wait()

    seconds = stage.settle()

    # Leases that ran out meanwhile let others do the work, so it may be done before.
    stage.wait_until(lambda: "answer that was lost" in worker.text)
    stage.record("coroutines' connections are half-open: everything handled", seconds=seconds)
    stage.check()


@pytest.mark.slow
def test_connections_that_are_reset_in_mid_statement_lose_and_double_nothing(
    stage: Stage, proxy: Proxy
):
    url = url_of(stage, proxy)
    workers = [stage.worker(url=url), stage.worker(url=url)]
    client = stage.client(url=url)
    stage.wait_until_started()
    client.begin("both 90")
    for _ in range(5):
        time.sleep(0.2)  # the moments are what is drawn
        proxy.reset()
    client.wait()

    stage.settle()

    assert all(worker.is_running for worker in workers)
    stage.check()


LOST_REPLIES = {
    "a handler's commit": "COMMIT",
    "a claim": "Lease the due tasks",
    "an ack": "End leased tasks well",
    "an ack in a transaction": "What ack.sql does",
    "a nack": "Nack",
    "a renewal": "Extend the leases in flight",
    "a pull": "Turn a page of new events",
}


@pytest.mark.parametrize("carried_out", sooner([True, False], True))
def test_a_lost_reply_loses_and_doubles_nothing(stage: Stage, proxy: Proxy, *, carried_out: bool):
    stage.consumers += ["slow"]
    url = url_of(stage, proxy)
    stage.worker(url=url)
    client = stage.client()
    stage.wait_until_started()
    lose = proxy.lose_reply_to if carried_out else proxy.lose
    events = {what: lose(fragment) for what, fragment in LOST_REPLIES.items()}
    client.do("say slow.on")
    client.do("both 40")

    stage.settle()

    # Not every statement is sure to have come by; most of them are.
    assert sum(event.is_set() for event in events.values()) >= 5
    stage.check()


@pytest.mark.parametrize("carried_out", sooner([True, False], True))
def test_a_publisher_whose_commit_gets_no_answer_is_in_doubt_and_nothing_is_halved(
    stage: Stage, proxy: Proxy, *, carried_out: bool
):
    stage.worker()
    client = stage.client(url=url_of(stage, proxy))
    lose = proxy.lose_reply_to if carried_out else proxy.lose
    for _ in range(5):
        happened = lose("COMMIT")
        client.do("publish 8")
        assert happened.is_set()

    stage.settle()

    facts = stage.check()
    in_doubt = [made for made in facts.publications if made.outcome == "in doubt"]
    assert len(in_doubt) >= 5
    assert all(bool(made.events & facts.ids) is carried_out for made in in_doubt)


@pytest.mark.slow
def test_latency_and_stalls_only_cost_time(stage: Stage, proxy: Proxy, seed: int):
    chance = random.Random(seed)  # noqa: S311  # repeatable on purpose

    def lateness() -> float:
        return chance.uniform(0.1, 0.5) if chance.random() < 0.05 else chance.uniform(0, 0.02)

    proxy.lateness = lateness
    stage.worker("--concurrency", "8", url=url_of(stage, proxy))
    client = stage.client()
    stage.wait_until_started()
    client.do("both 15")

    stage.settle()

    facts = stage.check()
    assert not any(task.lost_leases for task in facts.tasks), "a lease was renewed too late"


PATIENT_LEASE = 30.0  # seconds, of which a road that stalls may take several at a time


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stalls_of_seconds_on_a_slow_road_cost_no_lease(stage: Stage, proxy: Proxy, seed: int):
    """A fifth of a second each way, and one packet in twenty that is sent again, seconds later."""
    chance = random.Random(seed)  # noqa: S311  # repeatable on purpose

    def lateness() -> float:
        return 0.2 + (chance.uniform(1, 5) if chance.random() < 0.05 else 0)

    stage.consumers += ["slow"]
    stage.worker("--concurrency", "16", url=url_of(stage, proxy), FAULTS_LEASE=str(PATIENT_LEASE))
    client = stage.client()
    stage.wait_until_started()
    proxy.lateness = lateness
    client.do("say slow.on")  # longer than a lease
    client.do("both 15")

    seconds = stage.settle(400)

    proxy.lateness = float
    stage.record("stalls of 1 to 5 s: everything handled", seconds=seconds)
    facts = stage.check()
    assert not any(task.lost_leases for task in facts.tasks), "a lease was renewed too late"


def test_a_partition_longer_than_a_lease_lets_only_one_side_commit(stage: Stage, proxy: Proxy):
    cut_off = stage.worker(url=url_of(stage, proxy))
    client = stage.client()
    stage.wait_until_started()
    client.begin("both 60")
    stage.wait_until(lambda: stage.view.value("SELECT count(*) FROM kanthorq_django_task") > 40)
    with proxy.partitioned():
        client.wait()
        stage.worker()
        time.sleep(2 * LEASE_SECONDS)  # what is on trial is time that passes
    client.do("both 5")

    stage.settle()

    assert cut_off.is_running
    stage.check()


@pytest.mark.slow
def test_a_cable_that_is_pulled_and_plugged_in_again_loses_and_doubles_nothing(stage: Stage):
    name = f"kq{os.getpid() % 10_000}"
    with (
        network(name) as cable,
        Proxy((str(stage.server.socket_dir), PORT), cable.address) as proxy,
    ):
        worker = stage.worker(url=url_of(stage, proxy), within=name)
        client = stage.client()
        stage.wait_until_started()
        client.begin("both 60")
        threading.Event().wait(0.5)  # to be in the middle of it
        cable.pull()
        client.wait()
        stage.worker()
        time.sleep(3 * LEASE_SECONDS)  # what is on trial is time that passes
        cable.plug()
        client.do("both 5")

        stage.settle(2 * HEALED_WITHIN)

        assert worker.is_running
        stage.check()


@pytest.mark.slow
def test_a_cable_that_delays_and_loses_packets_only_costs_time(stage: Stage):
    name = f"kq{os.getpid() % 10_000}"
    with (
        network(name) as cable,
        Proxy((str(stage.server.socket_dir), PORT), cable.address) as proxy,
    ):
        if not cable.is_spoilt():
            pytest.skip("this kernel has no netem, or there is no tc; apt-get install iproute2")
        worker = stage.worker("--concurrency", "8", url=url_of(stage, proxy), within=name)
        client = stage.client()
        stage.wait_until_started()
        client.do("both 30")

        stage.settle(2 * HEALED_WITHIN)

        assert worker.is_running
        stage.check()
