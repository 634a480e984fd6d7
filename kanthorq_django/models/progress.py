"""How far a schedule is, which others move: an instance tells what was set on it from the rest.

What an open transaction wrote may be rolled back, and then has to be written again.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

from django.db import connections, models, transaction

# What turns move, and cancel() and resume(), and what nobody else means to.
PROGRESS = frozenset({"next_at", "last_at", "cancelled_at"})

_UNREAD = object()  # equals nothing that a column holds


class _Write:
    """Columns that a transaction wrote; a hook of its commit."""

    def __init__(self, columns: Mapping[str, Any], using: str) -> None:
        self.columns = columns
        self.using = using
        self.is_committed = False

    def __call__(self) -> None:
        self.is_committed = True

    def watch(self) -> None:
        """Learn of the commit, which is now without a transaction."""
        connection = connections[self.using]
        is_by_hand = not (connection.in_atomic_block or connection.get_autocommit())
        # There Django takes hooks inside a block alone, which sends nothing without a savepoint.
        with transaction.atomic(self.using, savepoint=False) if is_by_hand else nullcontext():
            transaction.on_commit(self, using=self.using)

    def is_open(self) -> bool:
        """Tell whether it may still be committed: Django forgets the hooks of a rollback."""
        return any(waiting[1] is self for waiting in connections[self.using].run_on_commit)


@dataclass(frozen=True, slots=True)
class _Known:
    """Progress as it was read, and as it was written since."""

    read: Mapping[str, Any]
    writes: Mapping[str, _Write] = field(default_factory=dict)

    def after_read(self, columns: Mapping[str, Any]) -> "_Known":
        others = {name: write for name, write in self.writes.items() if name not in columns}
        return _Known({**self.read, **columns}, others)

    def after_write(self, columns: Mapping[str, Any], using: str) -> "_Known":
        if not columns:
            return self
        write = _Write(columns, using)
        write.watch()
        read = {name: self.last(name) for name in self.read}
        return _Known(read, {**self.writes, **dict.fromkeys(columns, write)})

    def last(self, name: str) -> Any:
        """Return what was last seen, or is committed."""
        write = self.writes.get(name)
        if write is not None and write.is_committed:
            return write.columns[name]
        return self.read.get(name, _UNREAD)

    def is_being_written(self, name: str, value: Any, stored: Mapping[str, Any] | None) -> bool:
        """Tell whether an open transaction wrote ``value``, whatever moved in it after that.

        Of a savepoint that was rolled back by its id Django forgets no hooks: ``stored`` tells.
        """
        write = self.writes.get(name)
        if write is None or write.columns[name] != value or not write.is_open():
            return False
        return stored is None or stored[name] != self.read.get(name, _UNREAD)


class ProgressModel(models.Model):
    """A row with ``PROGRESS``, of which its instances know what they have read and written."""

    # A new row is nowhere yet, so what is not null was set.
    _known = _Known(dict.fromkeys(PROGRESS))

    class Meta:
        abstract = True

    @classmethod
    def from_db(cls, *args: Any, **kwargs: Any) -> Self:
        row = super().from_db(*args, **kwargs)
        row._known = _Known(row._held_progress(PROGRESS))
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
        self._known = self._known.after_read(self._held_progress(read))

    def _set_here(self, stored: "ProgressModel | None" = None) -> set[str]:
        """Return the progress that is to be written; ``stored`` is the row, if it was read."""
        row = None if stored is None else vars(stored)
        return {
            name
            for name, value in self._held_progress(PROGRESS).items()
            if self._known.last(name) != value
            and not self._known.is_being_written(name, value, row)
        }

    def _take_over(self, columns: Mapping[str, Any]) -> None:
        """Hold progress that is stored, or will be when this is saved, as such."""
        for name, value in columns.items():
            setattr(self, name, value)
        self._known = self._known.after_read(columns)

    def _note_written(self, columns: Collection[str], using: str) -> None:
        """Know that what was set here of ``columns`` was written, unless that is rolled back."""
        written = self._held_progress(self._set_here().intersection(columns))
        self._known = self._known.after_write(written, using)

    def _held_progress(self, names: Collection[str]) -> dict[str, Any]:
        held = vars(self)
        return {name: held[name] for name in PROGRESS.intersection(names) if name in held}
