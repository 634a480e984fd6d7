"""All contestants; those of the default set need nothing but PostgreSQL."""

from __future__ import annotations

from importlib import import_module

from benchmarks.peers.peer import Peer

QUICK = ("kanthorq", "pgqueuer", "bare")
DEFAULT = QUICK


def load(names: tuple[str, ...]) -> list[Peer]:
    """Return contestants by their names. Raises ModuleNotFoundError for an unknown one."""
    peers: list[Peer] = [import_module(f"benchmarks.peers.{name}.peer").PEER for name in names]
    return peers
