"""One signal per verb, sent after the statement that did it; the row may still roll back.

``published`` has ``sender=Event``, ``events`` and ``using``. ``pulled`` and ``claimed`` have
``sender=Consumer``, ``consumer`` and ``tasks``. ``acked`` and ``nacked`` have
``sender=Task`` and ``message``, and nacked ``reason``; both come from the thread that wrote
the verdict. ``cancelled``, ``resumed``, ``released`` and ``reset`` have ``sender=Task``,
``outcome`` and ``using``. ``pruned`` has ``sender=Event``, ``count`` and ``using``.

What a receiver of ``published``, of a verb, of ``pruned`` or of a handler's own ``ack()`` or
``nack()`` raises goes to the caller while a transaction is open, which it then rolls back; of what
is committed already it is logged only, or the caller would do it again.
"""

import logging
from contextlib import suppress
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.dispatch import Signal

from kanthorq_django.domain.interrupts import is_interrupt

logger = logging.getLogger("kanthorq_django")

published = Signal()
pulled = Signal()
claimed = Signal()
acked = Signal()
nacked = Signal()
cancelled = Signal()
resumed = Signal()
released = Signal()
reset = Signal()
pruned = Signal()


def tell(signal: Signal, sender: type, connection: BaseDatabaseWrapper, **told: Any) -> None:
    """Send ``signal`` of what was done on ``connection``.

    What a receiver raises goes to the caller while a transaction is open, else only to the log.
    """
    is_open = connection.in_atomic_block or not connection.get_autocommit()
    send = Signal.send if is_open else tell_of_what_lasts
    send(signal, sender, using=connection.alias, **told)


def tell_of_what_lasts(signal: Signal, sender: type, **told: Any) -> None:
    """Send ``signal`` of what is committed: whatever a receiver raises, but Ctrl-C, is logged."""
    try:
        signal.send_robust(sender, **told)
    except BaseException as error:
        if is_interrupt(error):
            raise
        with suppress(Exception):  # a filter of the project's log
            logger.exception("A receiver of a signal of %s, or its log, failed.", sender)
