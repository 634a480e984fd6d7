"""How far a schedule is, which others move: an instance tells what was set on it from the rest."""

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, Self

from django.db import connections, models, transaction

from kanthorq_django.sql.session import is_outside

# What turns move, and cancel() and resume(), and what nobody else means to.
PROGRESS = frozenset({"next_at", "last_at", "cancelled_at"})

NOWHERE: Mapping[str, Any] = dict.fromkeys(PROGRESS)  # what a row holds that does not exist yet
_UNREAD = object()  # equals nothing that a column holds


class ProgressModel(models.Model):
    """A row with ``PROGRESS``, of which its instances know what is stored, as far as they saw."""

    _known: Mapping[str, Any] = NOWHERE
    # What was there before a write in a transaction, which may have been undone since.
    _before: Mapping[str, Any] = {}

    class Meta:
        abstract = True

    @classmethod
    def from_db(cls, *args: Any, **kwargs: Any) -> Self:
        row = super().from_db(*args, **kwargs)
        row._known = row._held_progress(PROGRESS)
        return row

    def refresh_from_db(
        self,
        using: str | None = None,
        fields: Iterable[str] | None = None,
        from_queryset: Any = None,
    ) -> None:
        """Read columns anew; what was set on others still waits to be saved."""
        named = None if fields is None else set(fields)
        before = self._held_progress(PROGRESS)
        super().refresh_from_db(using, named, from_queryset)
        held = self._held_progress(PROGRESS if named is None else named)
        # ``from_queryset`` may leave out some of them.
        read = {name for name in held if held[name] is None or held[name] is not before.get(name)}
        self._know(read)

    def _set_here(self, stored: Mapping[str, Any] = NOWHERE) -> set[str]:
        """Return the progress that is to be written to a row that holds ``stored``.

        Also what was written and undone, as a rollback does: the row is what it was before.
        """
        held = self._held_progress(PROGRESS).items()
        new = {name for name, value in held if self._known.get(name, _UNREAD) != value}
        return new | {name for name, before in self._before.items() if stored[name] == before}

    def _take_over(self, columns: Mapping[str, Any]) -> None:
        """Hold progress that is stored, or will be when this is saved, as such."""
        for name, value in columns.items():
            setattr(self, name, value)
        self._know(columns)

    def _note_written(self, columns: Collection[str], using: str) -> None:
        """Know that ``columns`` are stored, at least until an open transaction is undone."""
        connection = connections[using]
        written = self._set_here().intersection(columns, self._known)
        before = {name: self._known[name] for name in written} | {**self._before}
        self._know(columns)
        if is_outside(connection):
            return
        self._before = before
        if written and connection.in_atomic_block:
            # Of a savepoint that is rolled back Django forgets the hook.
            forget = partial(self._forget_before, frozenset(written))
            transaction.on_commit(forget, using=using, robust=True)

    def _forget_before(self, names: Collection[str]) -> None:
        self._before = {name: was for name, was in self._before.items() if name not in names}

    def _know(self, columns: Collection[str]) -> None:
        self._known = {**self._known, **self._held_progress(columns)}
        self._forget_before(columns)

    def _held_progress(self, names: Collection[str]) -> dict[str, Any]:
        held = vars(self)
        return {name: held[name] for name in PROGRESS.intersection(names) if name in held}
