"""How far a schedule is, which others move: an instance tells what was set on it from the rest."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from django.db import connections, transaction

from kanthorq_django.models.guarded import GuardedModel
from kanthorq_django.sql.transactions import is_outside

# What turns move, and cancel() and resume(), and what nobody else means to.
PROGRESS = frozenset({"next_at", "last_at", "cancelled_at"})

NOWHERE: Mapping[str, Any] = dict.fromkeys(PROGRESS)  # what a row holds that does not exist yet


class ProgressModel(GuardedModel):
    """A row with ``PROGRESS``, which its instances write if it was set on them."""

    GUARDED = PROGRESS
    _known = NOWHERE
    # What was there before a write in a transaction, which may have been undone since.
    _before: Mapping[str, Any] = {}

    class Meta:
        abstract = True

    def _set_here(self, stored: Mapping[str, Any] = NOWHERE) -> set[str]:
        """Return the progress that is to be written to a row that holds ``stored``.

        Also what was written and rolled back since: the row holds what it held before that.
        """
        undone = {name for name, before in self._before.items() if stored[name] == before}
        return self._assigned() | undone

    def _take_over(self, columns: Mapping[str, Any]) -> None:
        """Hold progress that is stored, or is about to be; it does not count as set here."""
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
        super()._know(columns)
        self._forget_before(columns)
