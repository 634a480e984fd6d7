"""Tasks that are serialized by their resource key: one of a key at a time, across all workers.

The consumer's row is locked while a turn is given, in a statement before the one that looks:
two workers can never both find the same key free. No session state is involved, so it holds
behind a pooler as well, and a lease that runs out frees its key by itself.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django.db import connections, models
from django.db.models import Case, F, Q, When
from django.utils.translation import gettext_lazy as _

from kanthorq_django import sql
from kanthorq_django.sql.transactions import is_outside

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer

KEYS_PER_TASK = 4  # keys looked at for each task that is wanted; busy ones yield none
REACH_GROWTH = 4  # from a look that found nothing to the next


class Serialize(models.TextChoices):
    """Whether tasks with the same resource key run one at a time, and what a retry means."""

    OFF = "", _("side by side")
    ON = "on", _("one at a time; later ones pass a task that waits for its retry")
    STRICT = "strict", _("one at a time, in order; later ones wait for a task's retry")


@dataclass(slots=True)
class Turns:
    """What a process remembers of the turns that it gave for one consumer."""

    group_size: int = 1  # tasks of one key that are handled together
    served_key: str = ""  # whose turn was last; empty: the keys begin again
    were_all_given: bool = False  # by the last claim; other keys are taken, or wait for a retry
    claim_count: int = 0


@contextmanager
def turns_locked(consumer: "Consumer") -> Iterator[bool]:
    """Hold the right to give turns for the block; False when another worker has it."""
    using, params = consumer.using, {"consumer_id": consumer.pk}
    if not is_outside(connections[using]):
        # Such as a test that drains; whoever else claims meanwhile has to wait for its end.
        yield bool(sql.rows(using, "lock_turns", params))
        return
    with sql.begun(using, "lock_turns", params) as locked:
        yield bool(locked)


def next_in_turn(consumer: "Consumer", limit: int) -> list[int]:
    """Return the ids of at most ``limit`` tasks whose turn it is, a group of each key.

    Goes on after the key that it served last, so that keys take turns as well.
    """
    start = consumer.turns.served_key
    found = _walk(consumer, start, limit)
    if start and len(found) < limit and not consumer.turns.served_key:
        again = _walk(consumer, "", limit - len(found))
        found += [pk for pk in again if pk not in found]
    return found


def align_turns(consumer: "Consumer") -> None:
    """Let open tasks follow a consumer that began or ceased to serialize.

    In one transaction with that change: once it is stored, nobody would come back to them. Those
    that somebody is moving back by the rule before, and has not committed, are waited for.
    """
    using = consumer.using
    list(type(consumer)._base_manager.using(using).select_for_update().filter(pk=consumer.pk))
    sql.rows(using, "align_turns", {"consumer_id": consumer.pk})


def hold_rules(task_ids: Iterable[int], using: str) -> None:
    """Keep the consumers of these tasks from beginning or ceasing to serialize, for now."""
    sql.rows(using, "hold_rules", {"task_ids": list(task_ids)})


def present_turn_key() -> Case:
    """Return the turn key of tasks that begin again, by what their consumer does now.

    Which it has to go on doing: see ``hold_rules()``.
    """
    from kanthorq_django.models.consumer import Consumer

    serializing = Consumer.objects.exclude(serialize=Serialize.OFF)
    in_turn = When(~Q(resource_key="") & Q(consumer__in=serializing), then=F("resource_key"))
    return Case(in_turn, default=None)


def _walk(consumer: "Consumer", after_key: str, limit: int) -> list[int]:
    """Look behind ``after_key``, and on behind keys that are all busy, until the keys end."""
    reach = 1
    found = _look(consumer, after_key, limit, reach)
    while not found and consumer.turns.served_key:
        reach *= REACH_GROWTH
        found = _look(consumer, consumer.turns.served_key, limit, reach)
    return found


def _look(consumer: "Consumer", after_key: str, limit: int, reach: int) -> list[int]:
    keys_max = max(limit * KEYS_PER_TASK, 100) * reach
    rows: list[Any] = sql.rows(
        consumer.using,
        "turns",
        {
            "consumer_id": consumer.pk,
            "after_key": after_key,
            "is_strict": consumer.serialize == Serialize.STRICT,
            "per_key": consumer.turns.group_size,
            "keys_max": keys_max,
            # More of what is due than of keys, as it is read faster: once it is all, no key of a
            # task for later is looked at any more.
            "due_max": keys_max * reach,
            "limit": limit,
        },
    )
    is_cut_short = bool(rows) and (len(rows) == limit or rows[-1].position == keys_max)
    served = dict.fromkeys(row.turn_key for row in rows if row.id is not None)
    # One group of a key is one call of the handler: no more of them than there is room for.
    kept = list(served)[: max(1, limit // consumer.turns.group_size)]
    if len(kept) < len(served):
        consumer.turns.served_key = kept[-1]
    else:
        consumer.turns.served_key = rows[-1].turn_key if is_cut_short else ""
    return [row.id for row in rows if row.id is not None and row.turn_key in kept]
