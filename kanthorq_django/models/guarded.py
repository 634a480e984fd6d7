"""What a full ``save()`` leaves to others: columns that guarded statements move meanwhile.

An instance knows what it has read of them, and written, and so what was assigned since.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self

from django.db import models

_UNREAD = object()  # equals nothing that a column holds


class GuardedModel(models.Model):
    """A row with ``GUARDED`` columns."""

    GUARDED: ClassVar[frozenset[str]]
    # What is stored of them, as far as this instance saw.
    _known: Mapping[str, Any] = {}

    class Meta:
        abstract = True

    @classmethod
    def from_db(cls, *args: Any, **kwargs: Any) -> Self:
        row = super().from_db(*args, **kwargs)
        row._known = row._held_of(cls.GUARDED)
        return row

    def refresh_from_db(
        self,
        using: str | None = None,
        fields: Iterable[str] | None = None,
        from_queryset: Any = None,
    ) -> None:
        """Read columns anew; what was assigned to others stays so."""
        named = None if fields is None else set(fields)
        before = self._held_of(self.GUARDED)
        super().refresh_from_db(using, named, from_queryset)
        read = self._held_of(self.GUARDED if named is None else named)
        if from_queryset is not None:  # it may not read all: what it read is another object now
            read = {n: v for n, v in read.items() if v is None or v is not before.get(n)}
        self._know(read)

    def _assigned(self) -> set[str]:
        """Return the guarded columns that hold something else than what is known to be stored."""
        held = self._held_of(self.GUARDED).items()
        return {name for name, value in held if self._known.get(name, _UNREAD) != value}

    def _know(self, columns: Collection[str]) -> None:
        """Take what is held in ``columns`` for what is stored."""
        self._known = {**self._known, **self._held_of(columns)}

    def _held_of(self, columns: Collection[str]) -> dict[str, Any]:
        held = vars(self)
        return {name: held[name] for name in self.GUARDED.intersection(columns) if name in held}


def unguarded_columns(row: models.Model, guarded: frozenset[str]) -> set[str]:
    """Return what a full ``save()`` of a stored ``row`` writes: what was read, but the key."""
    columns = {each.attname for each in row._meta.concrete_fields if not each.primary_key}
    return columns - guarded - row.get_deferred_fields()
