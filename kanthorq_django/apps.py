"""The app's configuration."""

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class KanthorqConfig(AppConfig):
    """Events, streams and tasks."""

    name = "kanthorq_django"
    verbose_name = _("KanthorQ")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from django.utils.module_loading import autodiscover_modules

        from kanthorq_django import checks  # noqa: F401  # registers itself

        autodiscover_modules("subscribers")
