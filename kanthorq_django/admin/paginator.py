"""Pages of tables that are too long to be counted."""

from typing import TYPE_CHECKING, Any

from django.core.paginator import Paginator
from django.db import connections
from django.db.models import QuerySet
from django.utils.functional import cached_property

from kanthorq_django import sql
from kanthorq_django.admin.display import Estimate, Minimum

if TYPE_CHECKING:
    _Paginator = Paginator[Any]
else:
    _Paginator = Paginator

COUNT_MAX = 10_000  # rows that are counted one by one
PAGES_MAX = 1_000  # pages that can be turned: OFFSET reads all that it skips


class BoundedPaginator(_Paginator):
    """Counts at most ``COUNT_MAX`` rows; a longer table is estimated, a longer selection is cut."""

    object_list: "QuerySet[Any]"

    @cached_property
    def count(self) -> int:
        """How many rows can be paged through: exact, an Estimate, or a Minimum."""
        rows = self.object_list
        # Without its order, or the planner would sort what it counts.
        counted = rows.order_by().values("pk")[: COUNT_MAX + 1].count()
        if counted <= COUNT_MAX:
            return counted
        if rows.query.has_filters():
            return Minimum(COUNT_MAX)
        return Estimate(max(COUNT_MAX, estimate_rows(rows) or 0))

    @cached_property
    def num_pages(self) -> int:
        """How many pages can be turned."""
        return min(super().num_pages, PAGES_MAX)


def estimate_rows(rows: "QuerySet[Any]") -> int | None:
    """Return how long the whole table of ``rows`` is, about; None if PostgreSQL does not know."""
    table = connections[rows.db].ops.quote_name(rows.model._meta.db_table)
    for row in sql.rows(rows.db, "estimate_rows", {"table": table}):
        return int(row.count)
    return None
