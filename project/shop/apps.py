"""The shop's configuration."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """Orders, payments, refunds and e-mails, driven by events."""

    name = "project.shop"
    default_auto_field = "django.db.models.BigAutoField"
