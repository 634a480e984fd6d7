from django.apps import AppConfig


class FaultsConfig(AppConfig):
    """The workload's subscribers; only ``tests.faults.settings`` installs it."""

    name = "tests.faults"

    def ready(self) -> None:
        from tests.faults import hooks

        hooks.arm()
