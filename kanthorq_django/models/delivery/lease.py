"""What the holder of a lease may do with it; each statement is fenced by the lease's epoch."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from django.db import DataError, connections

from kanthorq_django import sql
from kanthorq_django.conf import get_settings
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.isolation import unconflicted

AT_ONCE = timedelta(0)


class Lease(NamedTuple):
    """The right to end a task: void as soon as the task has another epoch.

    ``since`` is when it began, in microseconds since 1970. A server that crashes without
    synchronous_commit, or a standby that is promoted, may give ids and epochs a second time.
    """

    task_id: int
    epoch: int
    since: int | None


class Failed(NamedTuple):
    """Why an attempt failed, and when the next one is due; ``is_final``: there is to be none."""

    failure: Failure
    delay: timedelta = AT_ONCE
    is_final: bool = False


def ack(results: Mapping[Lease, str | None], using: str, *, skip_locked: bool = False) -> set[int]:
    """End tasks well, each with its result as JSON text; return the ids that were still ours.

    With ``skip_locked``, here and below, a task that somebody has locked is left as it is.
    """
    if len(results) == 1 and not skip_locked:
        ((lease, result),) = results.items()
        params = _one(lease) | {"result": result}
        return unconflicted(using, sql.ids, using, "ack_one", params)
    return unconflicted(using, sql.ids, using, "ack", _many(results), skip_locked=skip_locked)


def ack_and_commit(results: Mapping[Lease, str | None], using: str) -> bool:
    """End tasks well and commit the open transaction, in one round trip.

    Returns False if any of them was no longer ours: nothing is committed then, and the transaction
    has to be rolled back.
    """
    try:
        if len(results) == 1:
            ((lease, result),) = results.items()
            sql.commit_with(using, "ack_last", _one(lease) | {"result": result})
        else:
            sql.commit_with(using, "ack_group", _many(results))
    except DataError as error:
        if sql.is_failed_cast(error, "leases held"):
            return False
        raise
    return True


def nack(
    failed: Mapping[Lease, Failed], using: str, *, skip_locked: bool = False
) -> dict[int, TaskState]:
    """Note failures and let the tasks wait; return the new states, by id, of those still ours."""
    params = _params(list(failed)) | {
        "delays": [attempt.delay for attempt in failed.values()],
        "finals": [attempt.is_final for attempt in failed.values()],
        "errors": [attempt.failure.error for attempt in failed.values()],
        "stacks": [attempt.failure.stack for attempt in failed.values()],
        "errors_max": get_settings().ERRORS_MAX,
    }
    rows = unconflicted(using, sql.rows, using, "nack", params, skip_locked=skip_locked)
    return {row.id: TaskState(row.state) for row in rows}


def hand_back(
    leases: Sequence[Lease],
    using: str,
    *,
    delay: timedelta = AT_ONCE,
    skip_locked: bool = False,
) -> set[int]:
    """Give tasks back without counting the attempt; return the ids that were still ours."""
    params = _params(leases) | {"delay": delay}
    return unconflicted(using, sql.ids, using, "hand_back", params, skip_locked=skip_locked)


def renew(extensions: Mapping[Lease, timedelta], using: str) -> dict[Lease, Any]:
    """Let leases end no earlier than their extension from now.

    Returns a row for each lease: ``is_renewed`` (False also when the row was locked),
    ``is_ours``, ``is_cancelled`` (its cancellation was asked for).
    """
    params = _params(list(extensions)) | {"extensions": list(extensions.values())}
    return _by_lease(unconflicted(using, sql.rows, using, "renew", params))


def last_states(leases: Iterable[Lease], using: str) -> dict[Lease, TaskState]:
    """Return the states of tasks that nobody was given after these leases; locks nothing.

    One that is not leased any more was ended by the holder of its lease.
    """
    given = list(leases)
    if len(given) == 1:
        found = sql.integers(connections[using], "last_lease", _one(given[0]))
        return {given[0]: TaskState(found[0])} if found else {}
    rows = _by_lease(sql.rows(using, "last_leases", _params(given)))
    return {lease: TaskState(row.state) for lease, row in rows.items()}


def asked_to_cancel(leases: Iterable[Lease], using: str) -> list[Lease]:
    """Return those of ``leases`` whose running task somebody asked to cancel; locks nothing."""
    return list(_by_lease(sql.rows(using, "cancel_requests", _params(list(leases)))))


def _by_lease(rows: Iterable[Any]) -> dict[Lease, Any]:
    return {Lease(row.id, row.lease_epoch, row.since): row for row in rows}


def _one(lease: Lease) -> dict[str, Any]:
    return {"id": lease.task_id, "lease_epoch": lease.epoch, "since": lease.since}


def _many(results: Mapping[Lease, str | None]) -> dict[str, Any]:
    texts = [result or "" for result in results.values()] if any(results.values()) else []
    return _params(list(results)) | {"results": texts}


def _params(leases: Sequence[Lease]) -> dict[str, Any]:
    ids, epochs, since = zip(*leases, strict=True) if leases else ((), (), ())
    return {"ids": _array(ids), "epochs": _array(epochs), "since": _array(since)}


def _array(integers: Iterable[int | None]) -> str:
    """Return an array as PostgreSQL reads it; psycopg would take ten times as long."""
    texts = ("NULL" if integer is None else str(integer) for integer in integers)
    return f"{{{','.join(texts)}}}"
