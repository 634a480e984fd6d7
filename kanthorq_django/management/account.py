"""Who types: the account of the operating system that runs a command."""

import os
import pwd
import socket


def shell_user() -> str:
    """Return ``user@host``, and who stands behind root's ``sudo``.

    The account is the kernel's word, not that of ``USER``, which anybody can set; ``SUDO_USER``
    too, but nobody becomes root by it.
    """
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container
        name = f"uid {uid}"
    behind = os.environ.get("SUDO_USER") if uid == 0 else None
    return f"{name}@{socket.gethostname()}" + (f" (sudo by {behind})" if behind else "")
