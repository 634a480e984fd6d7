"""What a project imports anywhere has to be importable before Django is set up."""

import os
import subprocess
import sys

import pytest

EVERYWHERE = """
from kanthorq_django import (
    Discard, Exponential, Fixed, Never, Polynomial, Retry, Snooze,
    apublish, apublish_many, publish, publish_many, subscribe,
)
import kanthorq_django.exceptions
import kanthorq_django.signals
import kanthorq_django.subscribers
import kanthorq_django
assert all(hasattr(kanthorq_django, name) for name in kanthorq_django.__all__)
"""


def run(program: str, **environment: str) -> None:
    """Run ``program`` in an interpreter that knows no settings; warnings are errors."""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], **environment},
    )


def test_the_public_names_are_importable_without_settings() -> None:
    run(EVERYWHERE)


def test_importing_them_reads_no_settings_and_loads_no_models() -> None:
    run(
        f"""{EVERYWHERE}
import sys
from django.conf import settings
from django.apps import apps
assert not settings.configured
assert not apps.ready
assert not [name for name in sys.modules if name.startswith("kanthorq_django.models")]
"""
    )


def test_policies_and_verdicts_work_without_settings() -> None:
    run(
        """
from datetime import timedelta
from kanthorq_django import Discard, Exponential, Fixed, Never, Polynomial, Retry, Snooze
assert Polynomial(jitter=0).next_delay(2) == timedelta(seconds=16)
Exponential(), Fixed(), Never(), Retry(timedelta(0)), Snooze(timedelta(0)), Discard()
"""
    )


@pytest.mark.parametrize("call", ["publish('a')", "publish_many([])"])
def test_publishing_without_settings_says_what_is_missing(call: str) -> None:
    run(
        f"""
from django.core.exceptions import ImproperlyConfigured
from kanthorq_django import publish, publish_many
try:
    {call}
except ImproperlyConfigured as error:
    assert "settings" in str(error), error
else:
    raise AssertionError("it did not fail")
"""
    )


def test_settings_may_import_the_public_names() -> None:
    run(
        """
from django.conf import settings
from kanthorq_django import Fixed, publish, subscribe
settings.configure(INSTALLED_APPS=["kanthorq_django"], DATABASES={})
import django
django.setup()
subscribe("order.>", consumer="refunds")(lambda message: None)
from kanthorq_django.models import Event
"""
    )
