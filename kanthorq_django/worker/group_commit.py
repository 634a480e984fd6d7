"""Group commit: the handlers of several atomic tasks in one transaction, with one ack.

Off unless ``KANTHORQ["GROUP_COMMIT"]`` is above 1. How a task is run alone is in executor.py.
"""

import functools
import itertools
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from django.db import connections, transaction

from kanthorq_django.domain.subscriptions import name_of
from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.message import Message
from kanthorq_django.models.delivery import lease
from kanthorq_django.worker.connections.suspicion import are_to_be_replaced, suspect_sessions
from kanthorq_django.worker.endings import (
    VERDICT_ROLLED_BACK,
    Ending,
    HandBack,
    after_error,
    after_return,
    concluded,
    kept_result,
)
from kanthorq_django.worker.executor import (
    Opened,
    ack_and_commit,
    call_handler,
    counting_hops,
    tell_of_acked,
)
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.log import logger

# After which a shared transaction begins no further handler. By the clock: where ten threads share
# a processor, each of them is slow, and a short time would leave transactions of two or three.
SHARED_SECONDS = 0.25
CAREFUL_SECONDS = 60.0  # with savepoints, after a shared transaction that failed

_careful_until: dict[str, float] = {}  # by consumer


def execute_together(flight: Flight, others: Iterator[Flight]) -> tuple[list[Ending], list[Flight]]:
    """Run the handler for ``flight``, then for each of ``others``, in one transaction.

    One commit, one ack. After ``SHARED_SECONDS`` no further one is begun. Returns the endings, and
    the flights that are to be run again, each on its own: if the transaction of several failed, by
    a handler, a lost lease, a deadlock or its commit, all of them. If it was committed after all,
    the fence takes the second run back. Handlers one of which raised of late have savepoints: it
    undoes only itself then.
    """
    subscription, using = flight.subscription, flight.message.using
    is_careful = time.monotonic() < _careful_until.get(subscription.consumer, 0.0)
    run = _run_in_savepoints if is_careful else _run_in_one
    begun: list[Flight] = []
    first_hooks: list[int] = []  # of each that has begun, by their places
    try:
        with transaction.atomic(using=using):
            flights = _noting_hooks(_in_time(flight, others, begun), first_hooks, using)
            results, failed = run(flights, Opened.by(using))
            _keep_hooks_apart(begun, first_hooks, using)
            ack_and_commit(results, using)
    except BaseException as error:  # noqa: BLE001  # as in execute()
        suspect_sessions(error)
        if not begun:  # the transaction itself could not be begun
            return [HandBack(flight.message, lease.AT_ONCE)], []
        if len(begun) == 1 or any(each.message.is_settled() for each in begun):
            return after_error(begun, error), []  # what is committed is never run again
        _prepare_reruns(begun)
        return [], begun
    tell_of_acked(results)
    have_failed = {ending.lease for ending in failed}
    handled = [each for each in begun if each.lease not in have_failed]
    return failed + concluded(after_return, handled, None), []


def _prepare_reruns(spoiled: list[Flight]) -> None:
    """Let each of them tell for itself, and those that come after them have savepoints."""
    consumer = spoiled[0].subscription.consumer
    _careful_until[consumer] = time.monotonic() + CAREFUL_SECONDS
    for flight in spoiled:
        flight.message.reopen()


def _run_in_one(
    flights: Iterable[Flight], opened: Opened
) -> tuple[dict[Message, str | None], list[Ending]]:
    """Run flights; return what to ack."""
    results: dict[Message, str | None] = {}
    for flight in flights:
        results |= _call_and_keep(flight, opened)
    return results, []


def _run_in_savepoints(
    flights: Iterable[Flight], opened: Opened
) -> tuple[dict[Message, str | None], list[Ending]]:
    """Do the same, so that one that fails is told of and undoes only itself."""
    results: dict[Message, str | None] = {}
    failed: list[Ending] = []
    for flight in flights:
        failure: BaseException | None = None
        try:
            with transaction.atomic(using=opened.using):
                try:
                    kept = _call_and_keep(flight, opened)
                except BaseException as error:
                    failure = error
                    raise
            results |= kept
        except BaseException as error:  # as in execute()
            # A lost lease lets nothing commit, not even around its savepoint. Nor does what came in
            # the way of the savepoint's end: nobody knows whether that has undone the writes.
            is_undone, failure = error is failure, None  # or the two would hold each other
            if not is_undone or opened.wrapper.needs_rollback or not opened.is_kept:
                raise
            failed += after_error([flight], error)
            if are_to_be_replaced():
                break  # the session may be what fails, and would fail those that follow
    return results, failed


def _in_time(flight: Flight, others: Iterator[Flight], begun: list[Flight]) -> Iterator[Flight]:
    """Yield ``flight`` and others until it is too late for more; note them in ``begun``."""
    until = time.monotonic() + SHARED_SECONDS
    for each in itertools.chain([flight], others):
        begun.append(each)
        yield each
        if time.monotonic() >= until:
            return


def _call_and_keep(flight: Flight, opened: Opened) -> dict[Message, str | None]:
    """Return the message with its result as JSON, or nothing if the handler ended it itself."""
    message = flight.message
    result = call_handler([flight])
    opened.refuse_unfit()
    if not message.has_verdict():
        return {message: kept_result(flight, result)}
    if message.is_open():
        raise message.refusal or KanthorqError(VERDICT_ROLLED_BACK)
    return {}


def _noting_hooks(
    flights: Iterable[Flight], first_hooks: list[int], using: str
) -> Iterator[Flight]:
    """Yield flights; note where in the block's hooks those of each begin."""
    for flight in flights:
        first_hooks.append(len(connections[using].run_on_commit))
        yield flight


def _keep_hooks_apart(flights: Sequence[Flight], first_hooks: Sequence[int], using: str) -> None:
    """Let a hook that raises or exits not keep those of other tasks from running."""
    hooks: list[Any] = connections[using].run_on_commit
    owners = [flights[bisect_right(first_hooks, place) - 1] for place in range(len(hooks))]
    hooks[:] = [
        (savepoints, functools.partial(_run_apart, hook, owner), True)
        for (savepoints, hook, _), owner in zip(hooks, owners, strict=True)
    ]


def _run_apart(hook: Callable[[], object], flight: Flight) -> None:
    """Run a hook of ``transaction.on_commit()``; Django would let pass what is no Exception."""
    try:
        with counting_hops([flight]):
            hook()
    except BaseException:
        logger.exception("A hook of a committed transaction, %s, failed.", name_of(hook))
