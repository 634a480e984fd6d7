"""One signal per verb, sent after the statement that did it; the row may still roll back.

``published`` has ``sender=Event``, ``events`` and ``using``. ``pulled`` and ``claimed`` have
``sender=Consumer``, ``consumer`` and ``tasks``. ``acked`` and ``nacked`` have
``sender=Task`` and ``message``, and nacked ``reason``; both come from the thread that wrote
the verdict. ``cancelled``, ``resumed``, ``released`` and ``reset`` have ``sender=Task``,
``outcome`` and ``using``. ``pruned`` has ``sender=Event``, ``count`` and ``using``.
"""

from django.dispatch import Signal

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
