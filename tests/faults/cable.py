"""A network of its own on this machine, and the cable that leads there."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

NEEDS = "network namespaces need root and iproute2; apt-get install iproute2"
# Of each direction: loss is repaired by TCP, at the price of its retransmissions.
BAD = ("delay", "40ms", "20ms", "loss", "5%")


class Cable:
    """Between this network and the one called ``name``; ``address`` is our end of it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def pull(self) -> None:
        ip("link", "set", f"{self.name}h", "down")

    def plug(self) -> None:
        ip("link", "set", f"{self.name}h", "up")

    def is_spoilt(self) -> bool:
        """Let it delay and lose packets; False where the kernel has no netem."""
        return not _run("tc", "qdisc", "replace", "dev", f"{self.name}h", "root", "netem", *BAD)

    def mend(self) -> None:
        _run("tc", "qdisc", "del", "dev", f"{self.name}h", "root")


@functools.cache
def is_possible() -> bool:
    """Tell whether this process may make networks."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    with suppress(AssertionError), laid(f"kqp{os.getpid()}"):
        return True
    return False


def can_be_spoilt() -> bool:
    """Tell whether the kernel can delay and lose packets by itself."""
    if shutil.which("tc") is None or not is_possible():
        return False
    with laid(f"kqp{os.getpid()}") as cable:
        return cable.is_spoilt()


@contextmanager
def network(name: str) -> Iterator[Cable]:
    """A network of its own. Skips loudly without the right to make one."""
    if not is_possible():
        pytest.skip(NEEDS)
    with laid(name) as cable:
        yield cable


@contextmanager
def laid(name: str) -> Iterator[Cable]:
    """Lay a cable. Names of interfaces have at most 15 characters."""
    here, there = f"{name}h", f"{name}t"
    number = os.getpid() % 2**14  # runs beside each other have networks of their own
    ours, its = (f"10.213.{number // 64}.{number % 64 * 4 + end}" for end in (1, 2))
    ip("netns", "add", name)
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("addr", "add", f"{ours}/30", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "addr", "add", f"{its}/30", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield Cable(name, ours)
    finally:
        _run("ip", "link", "del", here)  # at once, not when the last process within has ended
        ip("netns", "del", name)


def ip(*arguments: str) -> None:
    said = _run("ip", *arguments)
    assert not said, f"ip {' '.join(arguments)}: {said}"


def _run(*command: str) -> str:
    """Return what a command says about its failure, or nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or f"status {done.returncode}") if done.returncode else ""
