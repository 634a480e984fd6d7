"""The project's settings on a database that need not survive a crash of the machine.

Processes that a test starts get ``TESTED_DATABASE``, the name of the test's own database.
"""

import os

os.environ.setdefault("EMBEDDED_DURABLE", "false")

from project.settings import *  # noqa: F403
from project.settings import BASE_DIR, DATABASES, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.ledger"]

# Processes that run tests side by side have a server each: a transaction that is open in one
# database is in the snapshots of all databases of its server.
if _process := os.environ.get("PYTEST_XDIST_WORKER"):
    _home = BASE_DIR / f".postgres-{_process}"
    _home.mkdir(exist_ok=True)
    DATABASES["default"]["EMBEDDED_PROJECT"] = _home

# A run of its own beside another one: KANTHORQ_TEST_SUFFIX=2 make test
_suffix = os.environ.get("KANTHORQ_TEST_SUFFIX", "")
_tested = os.environ.get("TESTED_DATABASE")
DATABASES["default"]["TEST"] = {"NAME": f"test_kanthorq{_suffix}"}
DATABASES["other"] = DATABASES["default"] | {"TEST": {"NAME": f"test_kanthorq_other{_suffix}"}}
if _tested:
    DATABASES["default"]["NAME"] = _tested
    DATABASES["other"]["NAME"] = _tested.replace("test_kanthorq", "test_kanthorq_other")

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
