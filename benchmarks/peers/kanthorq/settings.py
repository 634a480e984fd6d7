"""KanthorQ's defaults: ``KANTHORQ`` is not set."""

from benchmarks.peers.settings import *  # noqa: F403
from benchmarks.peers.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "kanthorq_django", "benchmarks.peers.kanthorq"]
