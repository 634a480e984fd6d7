"""Writes the verdicts of handlers, as many as have come together in one statement."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from django.db import DatabaseError, connections

from kanthorq_django import signals
from kanthorq_django.domain.failures import Failure
from kanthorq_django.models import Task, lease
from kanthorq_django.models.lease import Lease
from kanthorq_django.worker.executor import Ack, Ending, HandBack, Nack
from kanthorq_django.worker.upkeep import UNAVAILABLE, Backoff

logger = logging.getLogger("kanthorq_django.worker")

BATCH_MAX = 1_000  # verdicts in one statement


class Acknowledger:
    """A thread that settles tasks; ``written`` is told which leases need no renewal any more."""

    def __init__(self, using: str, written: Callable[[Iterable[Lease]], None]) -> None:
        self._using = using
        self._written = written
        self._endings: queue.SimpleQueue[Ending | None] = queue.SimpleQueue()
        self._abandon = threading.Event()
        self._backoff = Backoff("acknowledger", self._abandon)
        self._thread = threading.Thread(target=self._run, name="kanthorq-acknowledger", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def settle(self, ending: Ending) -> None:
        """Take a verdict; it is written soon, and tried again until its lease is gone."""
        self._endings.put(ending)

    def finish(self, seconds: float) -> bool:
        """Write what is left within ``seconds``; False when the database did not let us."""
        self._endings.put(None)
        self._thread.join(seconds)
        self._abandon.set()
        return not self._thread.is_alive()

    def _run(self) -> None:
        is_open = True
        while is_open:
            endings, is_open = self._take()
            self.write(endings)
        connections.close_all()

    def _take(self) -> tuple[list[Ending], bool]:
        """Wait for verdicts; return what has come, and whether more may follow."""
        endings = []
        ending = self._endings.get()
        while ending is not None:
            endings.append(ending)
            if len(endings) == BATCH_MAX or self._endings.empty():
                return endings, True
            ending = self._endings.get()
        return endings, False

    def write(self, endings: list[Ending]) -> None:
        """Write verdicts now, in this thread; returns when the database has answered."""
        acks = [ending for ending in endings if isinstance(ending, Ack)]
        if acks:
            self._persist(partial(self._write_acks, acks), fallback=partial(self._one_by_one, acks))
        for ending in endings:
            match ending:
                case Nack():
                    self._persist(partial(self._write_nack, ending))
                case HandBack():
                    self._persist(partial(self._write_hand_back, ending))
        self._written([ending.lease for ending in endings])

    def _persist(
        self, write: Callable[[], None], *, fallback: Callable[[], None] | None = None
    ) -> None:
        """Run ``write`` until the database has answered; a refused statement is not repeated."""
        while not self._abandon.is_set():
            try:
                write()
            except UNAVAILABLE as error:
                self._backoff.failed(error)
            except DatabaseError:
                if fallback is None:
                    logger.exception("A verdict could not be written; its lease will run out.")
                else:
                    fallback()
                return
            else:
                self._backoff.succeeded()
                return

    def _one_by_one(self, acks: Sequence[Ack]) -> None:
        """One verdict that the database refuses must not take the others with it."""
        for ack in acks:
            self._persist(
                partial(self._write_acks, [ack]), fallback=partial(self._refuse_result, ack)
            )

    def _refuse_result(self, ack: Ack) -> None:
        failure = Failure("The database refused to store the result of the handler.")
        nack = Nack(ack.message, failure, lease.AT_ONCE, is_final=True)
        self._persist(partial(self._write_nack, nack))

    def _write_acks(self, acks: Sequence[Ack]) -> None:
        settled = lease.ack({ack.lease: ack.result for ack in acks}, self._using)
        for ack in acks:
            if ack.lease.task_id in settled:
                signals.acked.send_robust(Task, message=ack.message)
            else:
                self._log_lost(ack)

    def _write_nack(self, nack: Nack) -> None:
        state = lease.nack(
            nack.lease, nack.failure, self._using, delay=nack.delay, is_final=nack.is_final
        )
        if state is None:
            self._log_lost(nack)
        else:
            signals.nacked.send_robust(Task, message=nack.message, reason=nack.failure.error)

    def _write_hand_back(self, back: HandBack) -> None:
        if not lease.hand_back([back.lease], self._using, delay=back.delay):
            self._log_lost(back)

    def _log_lost(self, ending: Ending) -> None:
        logger.info(
            "Lease %d of task %d was over before its verdict; nothing was written.",
            ending.lease.epoch,
            ending.lease.task_id,
            extra={"task_id": ending.lease.task_id, "lease_epoch": ending.lease.epoch},
        )
