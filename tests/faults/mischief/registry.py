"""What a fault of a soak is, and where all of them are found by their names."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.turmoil import Turmoil

Fault = Callable[["Turmoil"], Any]  # False: there was nothing to harm
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    """Let a soak inject this now and then; it has healed, or is sure to, when it returns."""
    FAULTS[function.__name__.replace("_", " ")] = function
    return function


@contextmanager
def frozen(*pids: int, is_group: bool = False) -> Iterator[None]:
    """Stop processes for as long as the block runs, whatever happens in it."""
    send = os.killpg if is_group else os.kill
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                send(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                send(pid, signal.SIGCONT)
