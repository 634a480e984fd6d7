"""What happens to the roads between workers or publishers and the server."""

import time
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg

from tests.faults.mischief.registry import fault
from tests.faults.stage import LEASE_SECONDS
from tests.faults.test_network import LOST_REPLIES

if TYPE_CHECKING:
    from tests.faults.turmoil import Turmoil


@fault
def reset_connections(soak: "Turmoil") -> Any:
    soak.a_road().reset()


@fault
def silence_connections(soak: "Turmoil") -> Any:
    """Half-open: what is sent is swallowed; the server finds out by its keepalives."""
    soak.proxy.freeze()
    time.sleep(soak.chance.uniform(0.1, 2))
    soak.proxy.abandon()


@fault
def cut_the_road(soak: "Turmoil") -> Any:
    with soak.a_road().away():
        time.sleep(soak.chance.uniform(0.1, 3))


@fault
def partition(soak: "Turmoil") -> Any:
    with soak.a_road().partitioned():
        time.sleep(soak.chance.uniform(0.5, 2 * LEASE_SECONDS))


@fault
def delay_the_road(soak: "Turmoil") -> Any:
    """For a while; now and then as long as TCP needs to repair a loss."""
    chance = Random(soak.chance.random())  # noqa: S311  # of its own: others' threads draw from it
    latest = soak.chance.uniform(0, 0.2)
    road = soak.a_road()
    road.lateness = lambda: 1.0 if chance.random() < 0.01 else chance.uniform(0, latest)
    soak.later(3, lambda: setattr(road, "lateness", float))


@fault
def lose_replies(soak: "Turmoil") -> Any:
    for fragment in soak.chance.sample(list(LOST_REPLIES.values()), 3):
        lose = soak.proxy.lose_reply_to if soak.chance.random() < 0.7 else soak.proxy.lose
        lose(fragment)
    publishers = soak.publishers_road
    lose = publishers.lose_reply_to if soak.chance.random() < 0.7 else publishers.lose
    lose("COMMIT")


@fault
def pull_the_cable(soak: "Turmoil") -> Any:
    if soak.cable is None:
        return False
    soak.cable.pull()
    try:
        time.sleep(soak.chance.uniform(0.2, 2 * LEASE_SECONDS))
    finally:
        soak.cable.plug()
    return True


@fault
def spoil_the_cable(soak: "Turmoil") -> Any:
    """Packets come late, and every twentieth does not come."""
    if soak.cable is None or not soak.cable.is_spoilt():
        return False
    soak.later(3, soak.cable.mend)
    return True


@fault
def crash_the_pooler(soak: "Turmoil") -> Any:
    if soak.pool is None:
        return False
    soak.pool.kill()
    time.sleep(soak.chance.uniform(0, 2))
    soak.pool.start()
    return True


@fault
def restart_the_pooler(soak: "Turmoil") -> Any:
    """As a service manager does it: at once, or when its transactions have ended."""
    if soak.pool is None:
        return False
    soak.pool.stop(is_patient=soak.chance.random() < 0.5)
    soak.pool.start()
    return True


@fault
def pause_the_pooler(soak: "Turmoil") -> Any:
    if (pool := soak.pool) is None:
        return False
    soak.later(0, lambda: pool.order("PAUSE"))  # which waits for the end of all transactions
    time.sleep(soak.chance.uniform(0.5, 1.5 * LEASE_SECONDS))
    with suppress(psycopg.Error):  # it never came to a pause
        pool.order("RESUME")
    return True
