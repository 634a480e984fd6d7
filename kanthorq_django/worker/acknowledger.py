"""Writes the verdicts of handlers, as many as have come together in one statement."""

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from django.db import DatabaseError, connections
from django.dispatch import Signal

from kanthorq_django import signals
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.states import ACK, ACK_CANCELLING, LEASED, NACK, NACK_CANCELLING, Move
from kanthorq_django.models import Task
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.worker.attempt_log import names_of
from kanthorq_django.worker.connections.database_errors import is_about_values
from kanthorq_django.worker.connections.upkeep import leave_connections, spare_connections
from kanthorq_django.worker.endings import Ack, Ending, HandBack, Nack
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.persistence import Persistence, Write
from kanthorq_django.worker.warden import Bounded

BATCH_MAX = 1_000  # verdicts in one statement
BEHIND = 2  # such statements that are still to be written, after which no more tasks are leased
LOCKED_RETRY = 0.5  # seconds until a verdict is tried again whose task somebody has locked
RESULT_REFUSED = Failure("The database refused to store the result of the handler.")
ACK_REFUSED = Failure("The database refused to end the task; the log of the worker has it.")
FAILURE_REFUSED = Failure(
    "The database refused to store the failure; the log of the worker has it."
)


class Acknowledger:
    """A thread that settles tasks; ``written`` is told which leases need no renewal any more."""

    def __init__(
        self,
        using: str,
        written: Callable[[Iterable[Lease]], None],
        bounded: Bounded = contextlib.nullcontext,
        *,
        is_patient: bool = True,
    ) -> None:
        """One that ``is_patient`` waits where a right or a table is missing; others raise."""
        self._using = using
        self._written = written
        self._persistence = Persistence("acknowledger", using, bounded, is_patient=is_patient)
        self._endings: queue.SimpleQueue[Ending | None] = queue.SimpleQueue()
        self._doubtful: list[Ending] = []
        self._locked: list[Ending] = []
        self._untold: list[tuple[Signal, dict[str, Any]]] = []
        self._thread = threading.Thread(target=self._run, name="kanthorq-acknowledger", daemon=True)

    @property
    def is_behind(self) -> bool:
        """Whether handlers are faster than their verdicts are written: what is leased adds up."""
        return self._endings.qsize() >= BEHIND * BATCH_MAX

    def start(self) -> None:
        self._thread.start()

    def accept(self, endings: Sequence[Ending]) -> None:
        """Take verdicts; they are written soon, and tried again until their leases are gone."""
        done = [ending.lease for ending in endings if type(ending) is Ending]
        if done:
            self._written(done)  # to wake a thread for it would take longer
        for ending in endings:
            if type(ending) is not Ending:
                self._endings.put(ending)

    def finish(self, seconds: float) -> bool:
        """Write what is left within ``seconds``; False when the database did not let us."""
        self._endings.put(None)
        self._thread.join(seconds)
        self._persistence.give_up()
        return not self._thread.is_alive()

    def _run(self) -> None:
        is_open = True
        while is_open:
            try:
                endings, is_open = self._take()
                self.write(endings)
                leave_connections()
                spare_connections()
            except BaseException:  # without this thread no verdict is written any more
                logger.exception("The acknowledger failed; it goes on.")
        while self._locked and not self._persistence.wait(LOCKED_RETRY):
            self.write(self._take_locked())
        connections.close_all()

    def _take(self) -> tuple[list[Ending], bool]:
        """Wait for verdicts; return what has come, and whether more may follow."""
        endings = self._take_locked()
        try:
            ending = self._endings.get(timeout=LOCKED_RETRY if endings else None)
        except queue.Empty:
            return endings, True
        while ending is not None:
            endings.append(ending)
            if len(endings) >= BATCH_MAX or self._endings.empty():
                return endings, True
            ending = self._endings.get()
        return endings, False

    def _take_locked(self) -> list[Ending]:
        locked, self._locked = self._locked, []
        return locked

    def write(self, endings: list[Ending]) -> None:
        """Write verdicts now, in this thread; returns when the database has answered.

        Those whose tasks somebody has locked are kept for later, so that they do not hold up
        the others.
        """
        by_kind: dict[type, list[Any]] = {Ack: [], Nack: [], HandBack: [], Ending: []}
        for ending in _without_superseded(endings):
            by_kind[type(ending)].append(ending)
        try:
            self._persist(self._write_acks, by_kind[Ack])
            self._persist(self._write_nacks, by_kind[Nack])
            for _, together in itertools.groupby(sorted(by_kind[HandBack], key=_delay), key=_delay):
                self._persist(self._write_hand_backs, list(together))
            # Apart: if this is what fails, nothing that was written is to be written again.
            doubtful, self._doubtful = self._doubtful, []
            self._persist(self._sort_out, doubtful)
        finally:  # what nobody writes any more is not to be renewed either
            locked = {ending.lease for ending in self._locked}
            self._written([ending.lease for ending in endings if ending.lease not in locked])
        self._tell()

    def _persist(self, write: Write, endings: Sequence[Ending]) -> None:
        error = self._persistence.refusal_of(write, endings)
        if error is not None:
            self._refused(write, endings, error)

    def _refused(self, write: Write, endings: Sequence[Ending], error: BaseException) -> None:
        """Write one by one: a verdict that the database refuses must not take others with it."""
        if len(endings) > 1:
            for ending in endings:
                self._persist(write, [ending])
            return
        logger.error("A verdict could not be written.", exc_info=error)
        if write == self._sort_out:
            return  # what became of it nobody knows: the lease runs out
        match endings[0], error:
            case Ack() as ack, DatabaseError():
                self._persist(self._write_nacks, [_refused_ack(ack, error)])
            case Nack(failure=failure) as nack, DatabaseError() if failure is not FAILURE_REFUSED:
                self._persist(self._write_nacks, [replace(nack, failure=FAILURE_REFUSED)])

    def _write_acks(self, acks: Sequence[Ack]) -> None:
        results = {ack.lease: ack.result for ack in acks}
        ours = lease.ack(results, self._using, skip_locked=True)
        if signals.acked.has_listeners(Task):
            for ack in acks:
                if ack.lease.task_id in ours:
                    self._note_acked(ack)
        self._doubtful += [ack for ack in acks if ack.lease.task_id not in ours]

    def _note_acked(self, ack: Ack) -> None:
        self._untold.append((signals.acked, {"message": ack.message}))

    def _write_nacks(self, nacks: Sequence[Nack]) -> None:
        failed = {
            nack.lease: lease.Failed(nack.failure, nack.delay, nack.is_final) for nack in nacks
        }
        ours = lease.nack(failed, self._using, skip_locked=True)
        for nack in nacks:
            if nack.lease.task_id in ours:
                self._note_nacked(nack)
        self._doubtful += [nack for nack in nacks if nack.lease.task_id not in ours]

    def _note_nacked(self, nack: Nack) -> None:
        told = {"message": nack.message, "reason": nack.failure.error}
        self._untold.append((signals.nacked, told))

    def _write_hand_backs(self, backs: Sequence[HandBack]) -> None:
        """Give back tasks that share a delay."""
        leases = [back.lease for back in backs]
        delay = backs[0].delay if backs else lease.AT_ONCE
        ours = lease.hand_back(leases, self._using, delay=delay, skip_locked=True)
        self._doubtful += [back for back in backs if back.lease.task_id not in ours]

    def _tell(self) -> None:
        """Tell receivers last: they may do anything to the connection."""
        untold, self._untold = self._untold, []
        for signal, told in untold:
            signals.tell_of_what_lasts(signal, Task, **told)

    def _sort_out(self, doubtful: Sequence[Ending]) -> None:
        """Keep those whose tasks are merely locked; the leases of the others are over.

        Unless a verdict was written before, and only its answer was lost.
        """
        found = lease.last_states((ending.lease for ending in doubtful), self._using)
        for ending in doubtful:
            state = found.get(ending.lease)
            if state in LEASED:
                self._locked.append(ending)
            elif isinstance(ending, Ack) and state in _acked(ending).targets:
                self._note_acked(ending)
            elif isinstance(ending, Nack) and state in _nacked(ending).targets:
                self._note_nacked(ending)
            else:
                _log_lost(ending)


def _delay(back: HandBack) -> Any:
    return back.delay


def _acked(ack: Ack) -> Move:
    return ACK_CANCELLING if ack.message.is_cancellation else ACK


def _nacked(nack: Nack) -> Move:
    return NACK_CANCELLING if nack.message.is_cancellation else NACK


def _refused_ack(ack: Ack, error: DatabaseError) -> Nack:
    """Return what to write where the database has refused an ack.

    A result that it cannot store it would refuse again.
    """
    if ack.result is not None and is_about_values(error):
        return Nack(ack.message, RESULT_REFUSED, lease.AT_ONCE, is_final=True)
    return Nack(ack.message, ACK_REFUSED, ack.message.retry_delay())


def _without_superseded(endings: list[Ending]) -> list[Ending]:
    """Leave out leases that this worker itself has been given again: statements tell by tasks."""
    newest = {ending.lease.task_id: ending.lease.epoch for ending in endings}
    if len(newest) == len(endings):
        return endings
    for ending in endings:
        newest[ending.lease.task_id] = max(newest[ending.lease.task_id], ending.lease.epoch)
    left = []
    for ending in endings:
        if ending.lease.epoch == newest[ending.lease.task_id]:
            left.append(ending)
        else:
            _log_lost(ending)
    return left


def _log_lost(ending: Ending) -> None:
    extra = {
        **names_of(ending.message),
        "task_id": ending.lease.task_id,
        "lease_epoch": ending.lease.epoch,
    }
    # What a handler did in vain is done again; a hand-back would only have had that begin sooner.
    logger.log(
        logging.INFO if isinstance(ending, HandBack) else logging.WARNING,
        "%(consumer)s %(subject)s: lease %(lease_epoch)d of task %(task_id)d for event "
        "%(event_id)s was over before its verdict; nothing was written.",
        extra,
        extra=extra,
    )
