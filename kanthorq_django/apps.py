"""The app's configuration."""

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class KanthorqConfig(AppConfig):
    """Events, streams and tasks."""

    name = "kanthorq_django"
    verbose_name = _("KanthorQ")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from django.conf import settings
        from django.utils.module_loading import autodiscover_modules

        from kanthorq_django import checks, conf  # noqa: F401  # checks registers itself

        # Subscribers need the settings; wrong ones are for the system checks to tell, with hints,
        # and not for a traceback that keeps them from running.
        if not any(conf.problems(getattr(settings, "KANTHORQ", {}))):
            autodiscover_modules("subscribers")
