"""Customers at several tills at once, so that transactions overlap and commit in any order."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from django.db import connections

from project.shop import orders
from project.shop.catalogue import draw_basket
from project.shop.models import Sale

TILLS = 4
DECLINED_SHARE = 0.05
CANCELLED_SHARE = 0.04


class Tally(NamedTuple):
    """What customers did: orders that were placed, and those whose transaction was rolled back."""

    placed: int = 0
    declined: int = 0

    def plus(self, other: "Tally") -> "Tally":
        return Tally(self.placed + other.placed, self.declined + other.declined)


class Crowd:
    """Customers who are on their way through the tills."""

    def __init__(self, queues: list[Future[Tally]]) -> None:
        self._queues = queues

    def has_left(self) -> bool:
        return all(queue.done() for queue in self._queues)

    def tally(self) -> Tally:
        """Wait until the last customer has left; return what they all did."""
        total = Tally()
        for queue in self._queues:
            total = total.plus(queue.result())
        return total


@contextmanager
def shopping(sale: Sale, customers: int) -> Iterator[Crowd]:
    """Let ``customers`` shop while the block runs; it ends when the last one has left.

    If the block raises, the shop closes at once.
    """
    closing = threading.Event()
    with ThreadPoolExecutor(TILLS, thread_name_prefix="till") as pool:
        shares = [len(range(till, customers, TILLS)) for till in range(TILLS)]
        try:
            yield Crowd([pool.submit(_serve, sale, share, closing) for share in shares])
        except BaseException:
            closing.set()
            raise


def serve_one(sale: Sale, chance: random.Random) -> Tally:
    """Let one customer order; some cannot pay, and some change their mind at once."""
    basket = draw_basket(chance)
    try:
        order = orders.place(sale, basket, is_declined=chance.random() < DECLINED_SHARE)
    except orders.CardDeclined:
        return Tally(declined=1)
    if chance.random() < CANCELLED_SHARE:
        orders.cancel(order)
    return Tally(placed=1)


def _serve(sale: Sale, customers: int, closing: threading.Event) -> Tally:
    chance = random.Random()  # noqa: S311  # not a secret
    tally = Tally()
    try:
        for _ in range(customers):
            if closing.is_set():
                break
            tally = tally.plus(serve_one(sale, chance))
    finally:
        connections.close_all()
    return tally
