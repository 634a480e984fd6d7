from collections.abc import Iterator

import pytest

from tests.announcements import Ear, raw_connection


@pytest.fixture
def ear(transactional_db: None) -> Iterator[Ear]:
    """Somebody who listens to the streams ``a`` and ``b``."""
    with raw_connection() as listening, raw_connection() as speaking:
        yield Ear(listening, speaking)
