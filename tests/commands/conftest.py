"""What tests of commands share."""

import pytest

from kanthorq_django.domain.subscriptions import Registry


@pytest.fixture
def undeclared(declared: Registry) -> Registry:
    """The registry, without what the project and other tests declare."""
    for subscription in declared.all():
        declared.remove(subscription.consumer)
    return declared
