"""The worker's log. A filter of the project's that raises costs a line of it, and nothing else.

Python handles what its handlers raise, but not what filters do: it would go to the caller, a
thread that many tasks depend on, or a verdict that is already made.
"""

import logging
import traceback
from collections.abc import MutableMapping
from typing import Any


class _Log(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs  # an adapter would put its own extra in the place of the caller's

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            # One frame up: who calls this is to stand in the record.
            super().log(level, msg, *args, stacklevel=kwargs.pop("stacklevel", 1) + 1, **kwargs)
        except Exception:  # noqa: BLE001  # told as logging tells what a handler raises
            if logging.raiseExceptions:
                traceback.print_exc()


logger = _Log(logging.getLogger("kanthorq_django.worker"))
