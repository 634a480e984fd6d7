"""What must hold behind every door, whatever came in: all or nothing, and a usable transaction."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from django.apps import apps
from django.db import transaction

from tests.fuzz.oracle import refusals
from tests.ledger.models import Entry


def row_counts() -> dict[str, int]:
    """Return how many rows each of our tables has."""
    models = apps.get_app_config("kanthorq_django").get_models()
    return {model.__name__: model._base_manager.count() for model in models}


@contextmanager
def knocked(*errors: type[BaseException]) -> Iterator[list[BaseException]]:
    """Try something in a caller's transaction, which reads and writes on, and commits.

    One of ``errors`` must be told in a sentence, and nothing may be written then.
    """
    before, business = row_counts(), uuid4()
    with transaction.atomic():
        Entry.objects.create(event_id=business, note="before")
        with refusals(*errors) as refused:
            yield refused
        assert Entry.objects.filter(event_id=business).count() == 1
        Entry.objects.create(event_id=business, note="after")
    assert Entry.objects.filter(event_id=business).count() == 2
    if refused:
        assert row_counts() == before, "something was half-written"
