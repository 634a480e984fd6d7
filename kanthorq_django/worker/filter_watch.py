"""Whether the filters of a consumer are still those that this worker's code declares."""

from collections.abc import Iterable

from kanthorq_django.models import Consumer
from kanthorq_django.worker.log import logger

_Filters = tuple[list[str], list[str]]  # includes and excludes


class FilterWatch:
    """The filters that were declared here, and those that count, as the last pull saw them."""

    def __init__(self, consumers: Iterable[Consumer]) -> None:
        self._declared = {consumer.pk: _filters(consumer) for consumer in consumers}
        self._noticed = dict(self._declared)

    def is_overruled(self, consumer: Consumer) -> bool:
        """Tell whether others have given ``consumer`` filters that this worker does not declare."""
        return self._noticed[consumer.pk] != self._declared[consumer.pk]

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
    return list(consumer.subject_includes), list(consumer.subject_excludes)


def _shown(filters: _Filters) -> str:
    includes, excludes = filters
    return f"{includes} without {excludes}" if excludes else str(includes)
