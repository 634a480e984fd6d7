"""KanthorQ's defaults, but where the measurement is about a setting."""

import os

from benchmarks.peers.settings import *  # noqa: F403
from benchmarks.peers.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "kanthorq_django", "benchmarks.peers.kanthorq"]
KANTHORQ: dict[str, object] = {}
if os.environ.get("BENCH_NOTIFY") == "0":
    KANTHORQ["NOTIFY"] = False
if group := os.environ.get("BENCH_GROUP_COMMIT"):
    KANTHORQ["GROUP_COMMIT"] = int(group)
