"""What cannot be deleted by a queryset is refused as Django refuses it, before anything is done."""

import re
from typing import Any

import pytest
from django.db import NotSupportedError
from django.db.models import QuerySet

from kanthorq_django.models import Consumer, Event
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db


@pytest.fixture(params=[Event, Consumer])
def stored(request: pytest.FixtureRequest) -> QuerySet[Any]:
    TaskFactory.create()
    rows: QuerySet[Any] = request.param.objects.all()
    return rows


def test_what_is_no_whole_query_is_refused_in_djangos_words_and_unlocked(
    stored: QuerySet[Any], django_assert_num_queries: Any
) -> None:
    for part, error, told in (
        (stored[:1], TypeError, "Cannot use 'limit' or 'offset' with delete()."),
        (stored.order_by("pk")[1:], TypeError, "Cannot use 'limit' or 'offset' with delete()."),
        (stored.distinct("pk"), TypeError, "Cannot call delete() after .distinct(*fields)."),
        (stored.values("pk"), TypeError, "Cannot call delete() after .values() or .values_list()"),
        (
            stored.union(stored),
            NotSupportedError,
            "Calling QuerySet.delete() after union() is not supported.",
        ),
    ):
        with django_assert_num_queries(0), pytest.raises(error, match=f"^{re.escape(told)}$"):
            part.delete()
