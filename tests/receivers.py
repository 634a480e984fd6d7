"""Receivers of signals that are connected for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.dispatch import Signal


@contextmanager
def heard_by(receiver: Callable[..., Any], *signals: Signal) -> Iterator[None]:
    """Have ``receiver`` hear ``signals`` while the block runs."""
    for signal in signals:
        signal.connect(receiver)
    try:
        yield
    finally:
        for signal in signals:
            signal.disconnect(receiver)
