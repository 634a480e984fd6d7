"""The lanes of one worker: how they are chosen, and what is asked of all of them at once."""

import functools
import time
from collections.abc import Callable, Iterable

from kanthorq_django.domain.subscriptions import Subscription, is_coroutine
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.lanes.call import Call
from kanthorq_django.worker.lanes.coroutine_lane import CoroutineLane
from kanthorq_django.worker.lanes.lane import Accept, Lane
from kanthorq_django.worker.lanes.thread_lane import ThreadLane
from kanthorq_django.worker.warden import Bounded


class Lanes(dict[bool, Lane]):
    """Lanes by whether their handlers are coroutines; unneeded ones do not exist."""

    @property
    def started_count(self) -> int:
        return sum(lane.started_count for lane in self.values())

    @property
    def accepted_count(self) -> int:
        return sum(lane.accepted_count for lane in self.values())

    @property
    def waiting_count(self) -> int:
        return sum(lane.waiting_count for lane in self.values())

    @property
    def is_idle(self) -> bool:
        return all(lane.is_idle for lane in self.values())

    @property
    def is_alive(self) -> bool:
        return any(lane.is_alive for lane in self.values())

    def start(self) -> None:
        for lane in self.values():
            lane.start()

    def submit(self, calls: list[Call]) -> None:
        """Queue calls in the lanes of their handlers."""
        for kind, lane in self.items():
            if chosen := [call for call in calls if call.is_async is kind]:
                lane.submit(chosen)

    def surplus(self) -> list[Flight]:
        return [flight for lane in self.values() for flight in lane.surplus()]

    def drain(self) -> list[Flight]:
        return [flight for lane in self.values() for flight in lane.drain()]

    def wait_until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for lane in self.values():
            lane.wait_until_idle(max(0.0, deadline - time.monotonic()))

    def finish(self, seconds: float) -> None:
        """Wait for the threads to end, up to ``seconds`` in each lane where no handler runs."""
        for lane in self.values():
            lane.finish(seconds if lane.is_idle else 0)


def make_lanes(
    subscriptions: Iterable[Subscription],
    concurrency: int,
    accept: Accept,
    wake: Callable[[], None],
    bounded: Bounded,
) -> Lanes:
    """Return the lanes that handlers of ``subscriptions`` and their cleanups need."""
    kinds = {
        is_coroutine(handler)
        for subscription in subscriptions
        for handler in (subscription.handler, subscription.cancel_handler)
        if handler is not None
    }
    plain = functools.partial(ThreadLane, is_alone=len(kinds) == 1)
    classes: dict[bool, Callable[..., Lane]] = {False: plain, True: CoroutineLane}
    return Lanes({kind: classes[kind](concurrency, accept, wake, bounded) for kind in kinds})
