"""Whether the filters of a consumer are still those that this worker's code declares."""

import functools
from collections.abc import Iterable

from kanthorq_django.domain import subjects
from kanthorq_django.models import Consumer
from kanthorq_django.models.delivery.leased import Leased
from kanthorq_django.worker.log import logger

_Filters = tuple[tuple[str, ...], tuple[str, ...]]  # includes and excludes


class FilterWatch:
    """The filters that were declared here, and those that count, as far as they were seen."""

    def __init__(self, consumers: Iterable[Consumer]) -> None:
        self._declared = {consumer.pk: _filters(consumer) for consumer in consumers}
        self._noticed = dict(self._declared)

    def is_overruled(self, consumer: Consumer) -> bool:
        """Tell whether others have given ``consumer`` filters that this worker does not declare."""
        return self._noticed[consumer.pk] != self._declared[consumer.pk]

    def is_outside(self, consumer: Consumer, leased: Iterable[Leased]) -> bool:
        """Tell whether one of ``leased`` has a subject that this worker does not declare."""
        declared = self._declared[consumer.pk]
        told = (each.subject for each in leased)
        return any(not _selects(declared, subject) for subject in told if subject is not None)

    def note(self, consumer: Consumer) -> None:
        """Say once which filters, that code elsewhere declares, count instead of ours."""
        if self._noticed[consumer.pk] == (filters := _filters(consumer)):
            return
        self._noticed[consumer.pk] = filters
        if self.is_overruled(consumer):
            logger.warning(
                "Consumer %s now selects %s, where this code declares %s: other code has been "
                "started later. What only that subscribes to is left to it for a while.",
                consumer.name,
                _shown(filters),
                _shown(self._declared[consumer.pk]),
                extra={"consumer": consumer.name},
            )


def _filters(consumer: Consumer) -> _Filters:
    return tuple(consumer.subject_includes), tuple(consumer.subject_excludes)


@functools.lru_cache(maxsize=4_096)
def _selects(filters: _Filters, subject: str) -> bool:
    return subjects.selects(*filters, subject)


def _shown(filters: _Filters) -> str:
    includes, excludes = filters
    return f"{list(includes)} without {list(excludes)}" if excludes else str(list(includes))
