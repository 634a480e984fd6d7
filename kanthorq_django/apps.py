"""The app's configuration."""

import sys
from contextlib import suppress

from django.apps import AppConfig
from django.utils import autoreload
from django.utils.translation import gettext_lazy as _


class KanthorqConfig(AppConfig):
    """Events, streams and tasks."""

    name = "kanthorq_django"
    verbose_name = _("KanthorQ")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from django.conf import settings

        from kanthorq_django import checks, conf  # noqa: F401  # checks registers itself

        # Subscribers need the settings; wrong ones are for the system checks to tell, with hints,
        # and not for a traceback that keeps them from running.
        if not any(conf.problems(getattr(settings, "KANTHORQ", {}))):
            _import_subscribers()


def _import_subscribers() -> None:
    from django.utils.module_loading import autodiscover_modules

    if not _is_reloading_worker():
        return autodiscover_modules("subscribers")
    # As runserver does for all of a project: the command tells the error, and the reloader, which
    # knows the file by check_errors(), waits for it to be mended.
    with suppress(Exception):
        autoreload.check_errors(autodiscover_modules)("subscribers")
    return None


def _is_reloading_worker() -> bool:
    return sys.argv[1:2] == ["runworker"] and "--reload" in sys.argv
