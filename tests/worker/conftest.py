from typing import Any

import pytest

from kanthorq_django.models.delivery.cursor import peek
from kanthorq_django.worker import puller


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each look of a worker."""
    found: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> list[Any]:
        found.append(None)
        return peek(*args, **kwargs)

    monkeypatch.setattr(puller, "peek", counted)
    return found
