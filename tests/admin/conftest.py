"""People who look at the admin, each with as much as they may."""

from collections.abc import Callable

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client

VIEWS = ("view_stream", "view_event", "view_consumer", "view_task", "view_worker")

MakeClient = Callable[..., Client]


@pytest.fixture
def client_of(db: None) -> MakeClient:
    """Log in a member of the staff with the named permissions of this app, beside viewing."""

    def make(*codenames: str, views: tuple[str, ...] = VIEWS) -> Client:
        user = User.objects.create(username=f"staff-{User.objects.count()}", is_staff=True)
        user.user_permissions.set(
            Permission.objects.filter(
                content_type__app_label="kanthorq_django", codename__in=(*views, *codenames)
            )
        )
        client = Client()
        client.force_login(user)
        return client

    return make


@pytest.fixture
def viewer(client_of: MakeClient) -> Client:
    """May look at everything but bodies, and do nothing."""
    return client_of()


@pytest.fixture
def operator(client_of: MakeClient) -> Client:
    """May look at everything and use all four verbs."""
    return client_of("view_body", "cancel_task", "resume_task", "release_task", "reset_task")
