"""What the quick run leaves to the slow one."""

from collections.abc import Iterable
from typing import Any

import pytest


def sooner(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the values of a parameter, all but the chosen ones for the slow run only."""
    return [
        value if value in chosen else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]
