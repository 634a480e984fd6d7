"""How a bulk verb moves tasks: guarded by their states, in id order, told id by id."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar, cast
from uuid import UUID

from django.db import connections, models
from django.db.models import F, Q
from django.db.models.functions import Now
from django.db.models.sql import Query
from django.dispatch import Signal
from django.utils.asyncio import async_unsafe

from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import Move, TaskState
from kanthorq_django.models.delivery.turns import hold_rules
from kanthorq_django.models.isolation import together, undeadlocked
from kanthorq_django.models.publishing.notifications import (
    CANCEL_CHANNEL,
    channel,
    notify_after_commit,
)
from kanthorq_django.signals import tell

CHUNK_SIZE = 1_000  # rows that one statement locks

P = ParamSpec("P")
M = TypeVar("M", bound=models.Model)
QS = TypeVar("QS", bound=models.QuerySet[Any])


def bulk_verb(
    verb: Callable[Concatenate[QS, P], Outcome],
) -> Callable[Concatenate[QS, P], Outcome]:
    """Keep a verb off the manager and out of templates; refuse slices, ``.distinct(*fields)``.

    A coroutine is told of the verb's twin.
    """
    name = verb.__name__

    @async_unsafe(f"{name}() cannot be called from an async context; use `await a{name}(…)`.")
    @functools.wraps(verb)
    def refuse_parts(self: QS, *args: P.args, **kwargs: P.kwargs) -> Outcome:
        if self.query.is_sliced:
            raise TypeError(f"Cannot {name} a query once a slice has been taken.")
        if self.query.distinct_fields:
            raise TypeError(f"Cannot {name} a query after .distinct(*fields).")
        self._result_cache = None  # as update() does: rows that were read before are others now
        return verb(self, *args, **kwargs)

    alters_data(refuse_parts, queryset_only=True)
    return cast("Callable[Concatenate[QS, P], Outcome]", refuse_parts)


class RowVersion(models.Expression):
    """The ``xmin`` of the rows that a queryset is about: another one after each update."""

    def __init__(self) -> None:
        super().__init__(output_field=models.BigIntegerField())
        self._alias = ""

    def resolve_expression(self, query: Any = None, *_: Any, **__: Any) -> Self:
        resolved = self.copy()
        resolved._alias = query.get_initial_alias()
        return resolved

    def relabeled_clone(self, change_map: Any) -> Self:
        clone = self.copy()
        clone._alias = change_map.get(self._alias, self._alias)
        return clone

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        # Until Django 6.1 no alias was quoted, by that method.
        quote = getattr(compiler, "quote_name", None) or compiler.quote_name_unless_alias
        return f"{quote(self._alias)}.xmin::text::bigint", []


class _Found(NamedTuple):
    """What is known of a task when it is found, by its id."""

    event_id: UUID
    version: int


_Chunk = dict[int, _Found]  # by the ids of tasks


class SelectingQuerySet(models.QuerySet[M]):
    """Knows which rows it selects, also when others have changed some of them meanwhile."""

    def _plain(self) -> models.QuerySet[M]:
        """Return a queryset of the same rows that can be filtered and reduced to columns.

        No union can, nor one that locks the rows of a relation.
        """
        if not self.query.combinator:
            same = self.all()
            if same.query.select_for_update_of:
                same.query.select_for_update_of = ("self",)
            return same
        chosen = self.order_by().values("pk")
        _select_pk_alone(chosen.query.combined_queries)
        return self.model._base_manager.using(self.db).filter(pk__in=chosen)

    def _gone(self, locked: Mapping[Any, int], found: Mapping[Any, int]) -> set[Any]:
        """Return the keys of those that somebody changed meanwhile, so that they are not selected.

        Given are the versions of rows by their keys. Only what was changed is looked at again, as
        PostgreSQL itself does: what a window or a subquery says of the others is what it said when
        they were found.
        """
        changed = [pk for pk, version in locked.items() if version != found[pk]]
        if not changed:
            return set()
        again = self._plain().order_by().filter(pk__in=changed).values_list("pk", flat=True)
        return set(changed).difference(again)


class MovableQuerySet(SelectingQuerySet[M]):
    def _move(
        self, move: Move, signal: Signal, *, request_running: bool = False, **changes: Any
    ) -> Outcome:
        """Apply ``move`` in one transaction, chunk by chunk, so that memory stays bounded."""
        self._for_write = True
        all_of_it = functools.partial(self._move_all, move, changes, request_running)
        outcome = undeadlocked(self.db, all_of_it)
        tell(signal, self.model, connections[self.db], outcome=outcome)
        return outcome

    def _move_all(self, move: Move, changes: dict[str, Any], request_running: bool) -> Outcome:
        outcome = Outcome()
        with together(self.db):
            for chunk in self._chunks():
                outcome += self._move_chunk(chunk, move, changes, request_running=request_running)
        return outcome

    def _chunks(self) -> Iterator[_Chunk]:
        ordered = self._plain().order_by("pk").annotate(row_version=RowVersion())
        ordered.query.standard_ordering = True  # reverse() holds for whatever order is given
        found = ordered.values_list("pk", "event_id", "row_version").iterator(CHUNK_SIZE)
        # A join may repeat a task; sorted, the copies stand together.
        unique = ((pk, _Found(*told)) for (pk, *told), _ in itertools.groupby(found))
        while chunk := dict(itertools.islice(unique, CHUNK_SIZE)):
            yield chunk

    def _move_chunk(
        self,
        chunk: _Chunk,
        move: Move,
        changes: dict[str, Any],
        *,
        request_running: bool,
    ) -> Outcome:
        stored, connection = self.model._base_manager.using(self.db), connections[self.db]
        askable = {TaskState.RUNNING} if request_running else set()
        if "turn_key" in changes:
            hold_rules(chunk, self.db)  # before the tasks: so does who changes one
        locked = self._lock(chunk, move.sources | askable)
        versions = {pk: found.version for pk, found in chunk.items()}
        gone = self._gone({task.pk: task.row_version for task in locked}, versions)
        locked = [task for task in locked if task.pk not in gone]
        updated = {task.pk for task in locked if task.state in move.sources}
        requested = {task.pk for task in locked if task.state in askable and not task.is_asked}
        stored.filter(pk__in=updated, state__in=move.sources).update(**changes)
        stored.filter(pk__in=requested, state__in=askable).update(cancel_requested_at=Now())
        for stream_id in {task.stream for task in locked if task.pk in updated}:
            notify_after_commit(channel(stream_id), connection)
        if requested:
            notify_after_commit(CANCEL_CHANNEL, connection)
        left = chunk.keys() - updated - requested
        return Outcome(
            *(
                tuple(task.event_id for pk, task in chunk.items() if pk in told)
                for told in (updated, requested, left)
            )
        )

    def _lock(self, pks: Iterable[int], states: Iterable[TaskState]) -> list[Any]:
        """Lock those in ``states``, in id order and all at once, so that verbs never deadlock.

        Only task rows: a lock on their consumer would stop its pulls.
        """
        return list(
            self.model._base_manager.using(self.db)
            .select_for_update(of=("self",), no_key=True)
            .filter(pk__in=list(pks), state__in=states)
            .order_by("pk")
            .annotate(
                stream=F("consumer__stream"),
                is_asked=Q(cancel_requested_at__isnull=False),
                row_version=RowVersion(),
            )
            .values_list("pk", "state", "stream", "is_asked", "row_version", named=True)
        )


def _select_pk_alone(parts: Iterable[Query]) -> None:
    """Leave the parts of a union one column; Django leaves them those that they name."""
    for part in parts:
        part.set_values(["pk"])
        _select_pk_alone(part.combined_queries)
