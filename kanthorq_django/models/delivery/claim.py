"""The claim: tasks that are due are leased, those that wait for no turn and those whose turn it is.

What becomes of each is decided in claim.sql; whose turn it is, in turns.py.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from kanthorq_django import signals, sql
from kanthorq_django.conf import get_settings
from kanthorq_django.domain.amounts import counted, plural
from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.delivery.cursor import NO_FLOOR
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX, Leased, claimed_by, tell_of
from kanthorq_django.models.delivery.turns import Serialize, next_in_turn, turns_locked
from kanthorq_django.sql.result import Result

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer

logger = logging.getLogger("kanthorq_django")

LEASE_RAN_OUT = (
    "The lease ran out before the task was settled: the worker died, hung or was too slow."
)
NO_ATTEMPT_LEFT = (
    "No attempt at the cancellation is left: its consumer allows no more than there were."
)


class _Wanted(NamedTuple):
    states: list[TaskState]
    floor: int  # microseconds since 1970
    size_max: int  # bytes


def claim_due(
    consumer: "Consumer",
    limit: int,
    states: Iterable[TaskState],
    floor: int = NO_FLOOR,
    size_max: int = BODIES_SIZE_MAX,
) -> list[Leased]:
    """Do what ``Consumer.claim()`` does, without building the tasks.

    Tasks that wait for no turn are not looked for if they were due before ``floor``, microseconds
    since 1970: the caller knows that there are none. The bodies of those that were given a turn
    have no more than ``size_max`` bytes, or there is a single one; so have those of the others.
    """
    wanted = _Wanted(sorted(states), floor, size_max)
    while True:
        rows = _claim_in_turn(consumer, limit, wanted)
        leased = claimed_by(consumer, rows)
        _log_discarded(consumer, rows)
        if leased or rows[0].due_count == 0:
            break
    tell_of(signals.claimed, consumer, leased)
    return leased


def _claim_in_turn(consumer: "Consumer", limit: int, wanted: _Wanted) -> Result:
    if consumer.serialize == Serialize.OFF:
        return _claim(consumer, limit, wanted, [])
    with turns_locked(consumer) as is_ours:
        # A part of the room is left for tasks that wait for no turn, such as cancellations. Where
        # there is a single place, they come first in every other claim.
        turns = consumer.turns
        turns.claim_count += 1
        turns.were_all_given = False
        if limit == 1 and turns.claim_count % 2:
            rows = _claim(consumer, limit, wanted, [])
            if rows[0].due_count:
                return rows
        share = max(1, limit - max(1, limit // 4))
        in_turn = next_in_turn(consumer, share) if is_ours else []
        rows = _claim(consumer, limit - len(in_turn), wanted, in_turn)
        (is_cut,) = rows.values(0, ("is_cut",))
        turns.were_all_given = is_ours and len(in_turn) < share and not is_cut
        return rows


def _claim(consumer: "Consumer", limit: int, wanted: _Wanted, in_turn: list[int]) -> Result:
    return sql.lazy_rows_alone(
        consumer.using,
        "claim",
        {
            "consumer_id": consumer.pk,
            "states": wanted.states,
            "limit": limit,
            "visibility_timeout": consumer.visibility_timeout,
            "in_turn": in_turn,
            "floor": wanted.floor,
            "size_max": wanted.size_max,
            "handler_ran_out": LEASE_RAN_OUT + _timeout_told(consumer),
            "lease_ran_out": LEASE_RAN_OUT,
            "no_attempt_left": NO_ATTEMPT_LEFT,
            "errors_max": get_settings().ERRORS_MAX,
        },
    )


def _timeout_told(consumer: "Consumer") -> str:
    return "" if consumer.timeout is None else f" Its handler's timeout is {consumer.timeout}."


def _log_discarded(consumer: "Consumer", rows: Result) -> None:
    """Say which tasks ended in a claim; no signal tells, as there is no message of them."""
    count, events = rows.values(0, ("discarded_count", "discarded"))
    if not count:
        return
    with suppress(Exception):  # a filter of the project's; the leases are given by now
        logger.error(
            "Consumer %s: %s had no attempt left when due again and went to discarded; %s %s",
            consumer.name,
            counted(count, "task"),
            plural(count, "event"),
            ", ".join(events) + (" …" if count > len(events) else ""),
        )
