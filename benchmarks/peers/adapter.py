"""What a contestant's ``adapter.py`` can be asked to do, as a program in its own environment.

``install``, ``enqueue JOB COUNT``, ``publish JOB COUNT``, ``ping JOB COUNT SECONDS``, or the name
of one of its own methods with arguments; the answer is one line of JSON. The database is
``BENCH_DSN``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from benchmarks.peers.board import stopwatch

BODY_SIZE = int(os.environ.get("BENCH_BODY_SIZE", "0"))  # read once: that takes as long as a body
WARM_UP = 50  # publications before the clock starts: connections, prepared statements


class Adapter(ABC):
    """One contestant, seen by those who publish."""

    @abstractmethod
    def install(self) -> None:
        """Create the tables that workers and publishers need."""

    @abstractmethod
    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        """Publish many jobs in the fastest way the contestant documents."""

    @abstractmethod
    def publish(self, job: str, numbers: Iterable[int]) -> None:
        """Publish jobs one by one, each with a commit of its own."""


def dsn() -> str:
    """Return the URL of the run's database."""
    return os.environ["BENCH_DSN"]


def body(number: int) -> bytes:
    """Return what job ``number`` carries: the number, padded if the run asks for that."""
    return str(number).encode().ljust(BODY_SIZE)


def main(adapter: Adapter) -> None:
    """Do what the command line asks for, and print how long it took."""
    verb, *arguments = sys.argv[1:]
    verbs: dict[str, Callable[..., dict[str, float]]] = {
        "install": _install,
        "enqueue": _enqueue,
        "publish": _publish,
        "ping": _ping,
        "take_turns": _take_turns,
    }
    if verb in verbs:
        answer = verbs[verb](adapter, *arguments)
    else:
        answer = getattr(adapter, verb)(*arguments)
    print(json.dumps(answer))


def _install(adapter: Adapter) -> dict[str, float]:
    adapter.install()
    return {}


def _enqueue(adapter: Adapter, job: str, count: str) -> dict[str, float]:
    # Outside of the time: the connection. Nobody handles the job called warm.
    adapter.enqueue("warm", range(WARM_UP))
    began = time.perf_counter()
    adapter.enqueue(job, range(int(count)))
    return {"seconds": time.perf_counter() - began}


def _publish(adapter: Adapter, job: str, count: str, start_at: str = "0") -> dict[str, float]:
    adapter.publish("warm", range(WARM_UP))
    time.sleep(max(0.0, float(start_at) - time.time()))
    began = time.perf_counter()
    adapter.publish(job, range(int(count)))
    return {"seconds": time.perf_counter() - began}


def _take_turns(adapter: Adapter, job: str, count: str) -> dict[str, float]:
    """Publish ``count`` jobs for each line that is read, and answer with the seconds."""
    adapter.publish("warm", range(WARM_UP))
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        adapter.publish(job, range(int(count)))
        print(time.perf_counter() - began, flush=True)
    return {}


def _ping(adapter: Adapter, job: str, count: str, gap: str) -> dict[str, float]:
    adapter.publish("warm", range(WARM_UP))
    time.sleep(1)
    adapter.publish(job, _paced(int(count), float(gap)))
    return {}


def _paced(count: int, gap: float) -> Iterator[int]:
    """Yield numbers, each after a pause, and note when: publishing begins then."""
    watch = stopwatch()
    for number in range(1, count + 1):  # 0 was queued before the worker was started
        time.sleep(gap)
        watch.published(number)
        yield number
