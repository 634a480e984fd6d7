"""Loops of handlers: an event that a handler publishes is one hop further than the one it handles.

Counted only where ``KANTHORQ["HOPS_MAX"]`` is set, in the event's metadata.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kanthorq_django.exceptions import InvalidEvent

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event

KEY = "hops"
# Of what is published now; 0 outside of handlers.
_hops: ContextVar[int] = ContextVar("kanthorq_hops", default=0)


@contextmanager
def following(events: "Iterable[Event]") -> Iterator[None]:
    """Let what the block publishes count as one hop after the furthest of ``events``."""
    token = _hops.set(1 + max(_hops_of(event.metadata) for event in events))
    try:
        yield
    finally:
        _hops.reset(token)


def count_hops(events: "Iterable[Event]", limit: int) -> None:
    """Write into ``events`` that are to be published how far they are; InvalidEvent if too far.

    One that is put off to a later time starts a chain of its own: it is no loop that runs hot.
    """
    hops = _hops.get()
    followers = [event for event in events if event.schedule_at is None] if hops else []
    if followers and hops > limit:
        raise InvalidEvent(
            f"The event would be {hops} hops behind the first of its chain, the limit is {limit} "
            "(KANTHORQ['HOPS_MAX']): do handlers publish in a loop?"
        )
    for event in followers:
        event.metadata = event.metadata | {KEY: hops}


def _hops_of(metadata: dict[str, Any]) -> int:
    hops = metadata.get(KEY)
    return hops if type(hops) is int else 0
