"""All contestants; those of the default set need nothing but PostgreSQL."""

from __future__ import annotations

from importlib import import_module

from benchmarks.peers.peer import Peer

QUICK = ("kanthorq", "pgqueuer", "bare")
ON_POSTGRESQL = (
    *QUICK,
    "huey",
    "chancy",
    "procrastinate",
    "django_q2",
    "django_tasks_db",
    "django_ox",
    "dj_queue",
)
ON_REDIS = ("huey_redis", "dramatiq", "celery")
ALL = (*ON_POSTGRESQL, *ON_REDIS)


def load(names: tuple[str, ...]) -> list[Peer]:
    """Return contestants by the names of their folders."""
    peers: list[Peer] = [import_module(f"benchmarks.peers.{name}.peer").PEER for name in names]
    return peers
