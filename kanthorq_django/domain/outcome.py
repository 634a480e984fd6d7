"""What a bulk verb did, id by id."""

from dataclasses import dataclass
from typing import Self
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Outcome:
    """Event ids of the tasks that a bulk verb met, or ids of schedules; each in one tuple only.

    An event that several consumers owe may stand in several, once for each of its tasks.

    ``updated`` moved at once, ``requested`` are running and were asked to stop,
    ``noop`` were left alone: the verb does not leave their state, or nobody knows the id.
    """

    updated: tuple[UUID, ...] = ()
    requested: tuple[UUID, ...] = ()
    noop: tuple[UUID, ...] = ()

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.updated + other.updated,
            self.requested + other.requested,
            self.noop + other.noop,
        )
