"""Django settings for contestants that are Django apps, and for handlers that write rows."""

import os
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_parts = urlsplit(os.environ["BENCH_DSN"])
_query = {name: values[0] for name, values in parse_qs(_parts.query).items()}

SECRET_KEY = "of a benchmark"  # noqa: S105  # nothing is signed
DEBUG = False
USE_TZ = True
INSTALLED_APPS = ["benchmarks.effects"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES: dict[str, Any] = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _parts.path.lstrip("/"),
        "USER": unquote(_parts.username or ""),
        "PASSWORD": unquote(_parts.password or ""),
        "HOST": _query.get("host", ""),
        "PORT": _query.get("port", ""),
        "CONN_MAX_AGE": None,
    }
}
