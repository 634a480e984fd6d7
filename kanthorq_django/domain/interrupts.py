"""Which exception of a project's code ends ours as well: that of Ctrl-C, and no other."""

import threading


def is_interrupt(error: BaseException) -> bool:
    """Tell whether ``error``, raised by a project's code, is to be raised on, as no other is.

    Python raises KeyboardInterrupt in the main thread alone, where a test or a command is to end
    by it. Whatever else a policy, a receiver or an exception's text raises, CancelledError and
    sys.exit() too, is a fault of theirs: it must not end a thread that many tasks depend on.
    """
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and isinstance(error, KeyboardInterrupt)
