"""What processes of the fault tests run with; DATABASE_URL says against which server."""

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.faults"]
DATABASES = {"default": DATABASES["default"]}
KANTHORQ = {"GROUP_COMMIT": int(os.environ.get("FAULTS_GROUP_COMMIT", "1"))}

if _pool_size := os.environ.get("FAULTS_POOL_SIZE"):
    DATABASES["default"]["OPTIONS"] = DATABASES["default"].get("OPTIONS", {}) | {
        "pool": {"min_size": 1, "max_size": int(_pool_size)}
    }

# Where reads go by way of a router, if there is a standby to read from.
if _replica := os.environ.get("FAULTS_REPLICA"):
    DATABASES["replica"] = DATABASES["default"] | {"HOST": _replica, "OPTIONS": {}}
    DATABASE_ROUTERS = ["tests.faults.routers.ReadsFromReplica"]
