"""One worker process that takes 50 jobs at a time, and keeps no results."""

from benchmarks.peers.settings import *  # noqa: F403
from benchmarks.peers.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "django_q"]
Q_CLUSTER = {
    "name": "bench",
    "orm": "default",
    "workers": 1,
    "bulk": 50,
    "queue_limit": 50,
    "recycle": 1_000_000,
    "save_limit": -1,
    "timeout": 300,
    "retry": 600,
    "log_level": "WARNING",
}
