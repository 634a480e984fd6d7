"""Waiting for something that other processes do, for as long as it makes progress."""

import time
from collections.abc import Callable

from project.shop.interruption import rest

LOOK_EVERY = 0.05  # seconds
ASK_EVERY = 1.0  # seconds between questions after progress, which cost more
LONGEST = 30.0  # seconds without progress


class NothingHappens(Exception):
    """Nothing has moved for so long that nothing will."""


def wait_until(is_done: Callable[[], bool], progress: Callable[[], object]) -> None:
    """Return as soon as ``is_done()``.

    Raises NothingHappens if ``progress()`` has returned the same for half a minute, and
    Interrupted if somebody asks for the end.
    """
    seen, moved_at = progress(), time.monotonic()
    asked_at = moved_at
    while not is_done():
        rest(LOOK_EVERY)
        if (now := time.monotonic()) - asked_at < ASK_EVERY:
            continue
        asked_at = now
        if (latest := progress()) != seen:
            seen, moved_at = latest, now
        elif now - moved_at > LONGEST:
            raise NothingHappens(f"Nothing has moved for {LONGEST:.0f} seconds.")
