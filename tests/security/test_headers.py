"""Our admin pages tell browsers to run, load and frame nothing foreign."""

import copy
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import Client

from kanthorq_django.admin.policy import HEADER
from kanthorq_django.models import OperatorAction, TaskState, Worker
from kanthorq_django.models.audit import Order
from tests.admin.pages import page, press, tick
from tests.admin.schedules import kept
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db

STRICT = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HERE = "tests.security.test_headers"
CSP_MIDDLEWARE = "django.middleware.csp.ContentSecurityPolicyMiddleware"
needs_django_6 = pytest.mark.skipif(
    find_spec("django.middleware.csp") is None, reason="Django 6 brings the middleware"
)

GetResponse = Callable[[HttpRequest], HttpResponse]


def with_own_policy(get_response: GetResponse) -> GetResponse:
    """A project's middleware that sets the header whatever is there."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        response[HEADER] = "default-src 'none'"
        return response

    return middleware


def like_django_csp(get_response: GetResponse) -> GetResponse:
    """Marks the request, and sets the header only where there is none, as django-csp does."""

    def middleware(request: Any) -> HttpResponse:
        request.csp_nonce = "abc"
        response = get_response(request)
        response.headers.setdefault(HEADER, "script-src 'nonce-abc'")
        return response

    return middleware


@pytest.fixture
def addresses() -> list[str]:
    task = TaskFactory.create(state=TaskState.DISCARDED)
    worker = Worker.objects.create(host="shop-1", pid=42, concurrency=10, consumers=[])
    Order(operator="a", origin=OperatorAction.Origin.ADMIN).record(
        "tasks.cancel", using="default", counts={"updated": 1}
    )
    rows = {
        "stream": task.consumer.stream_id,
        "event": task.event_id,
        "consumer": task.consumer_id,
        "task": task.pk,
        "worker": worker.pk,
        "schedule": kept().pk,
        "operatoraction": OperatorAction.objects.get().pk,
    }
    found = [page(f"{noun}_changelist") for noun in rows]
    for name in ("change", "history"):
        found += [page(f"{noun}_{name}", pk) for noun, pk in rows.items()]
    return [*found, page("schedule_add"), page("consumer_delete", rows["consumer"])]


def test_every_page_carries_the_strict_headers(admin_client: Client, addresses: list[str]):
    for address in addresses:
        response = admin_client.get(address)
        assert response.status_code == 200, address
        assert response[HEADER] == STRICT, address
        assert response["X-Frame-Options"] == "DENY", address
        assert response["Referrer-Policy"] == "same-origin", address
        assert response["X-Content-Type-Options"] == "nosniff", address


def test_answers_to_actions_and_buttons_carry_them_too(admin_client: Client):
    task = TaskFactory.create(state=TaskState.DISCARDED)
    assert press(admin_client, "resume", task)[HEADER] == STRICT
    asked = tick(admin_client, "cancel", [task], select_across="1")
    assert b"confirmed" in asked.content
    assert asked[HEADER] == STRICT


def test_clickjacking_is_refused_without_djangos_middleware_too(admin_client: Client, settings):
    settings.MIDDLEWARE = [each for each in settings.MIDDLEWARE if "clickjacking" not in each]
    assert admin_client.get(page("task_changelist"))["X-Frame-Options"] == "DENY"


def test_a_project_that_frames_its_own_pages_may_go_on(admin_client: Client, settings):
    settings.X_FRAME_OPTIONS = "SAMEORIGIN"
    assert "frame-ancestors 'self'" in admin_client.get(page("task_changelist"))[HEADER]


def test_pages_of_others_are_left_alone(admin_client: Client):
    assert HEADER not in admin_client.get("/admin/")


def test_static_files_on_another_host_are_allowed(admin_client: Client, settings):
    settings.STATIC_URL = "https://cdn.example.com/static/"
    policy = admin_client.get(page("task_changelist"))[HEADER]
    assert policy.startswith("default-src 'self' https://cdn.example.com; ")


def test_a_projects_own_header_wins(admin_client: Client, settings):
    settings.MIDDLEWARE = [f"{HERE}.with_own_policy", *settings.MIDDLEWARE]
    assert admin_client.get(page("task_changelist"))[HEADER] == "default-src 'none'"


def test_a_project_with_django_csp_keeps_its_policy(admin_client: Client, settings):
    settings.MIDDLEWARE = [f"{HERE}.like_django_csp", *settings.MIDDLEWARE]
    assert admin_client.get(page("task_changelist"))[HEADER] == "script-src 'nonce-abc'"


@needs_django_6
def test_a_project_with_djangos_own_policy_keeps_it(admin_client: Client, settings):
    settings.MIDDLEWARE = [CSP_MIDDLEWARE, *settings.MIDDLEWARE]
    settings.SECURE_CSP = {"default-src": ["'self'", "https://theme.example.com"]}
    policy = admin_client.get(page("task_changelist"))[HEADER]
    assert policy == "default-src 'self' https://theme.example.com"


@needs_django_6
def test_djangos_middleware_without_a_policy_leaves_room_for_ours(admin_client: Client, settings):
    settings.MIDDLEWARE = [CSP_MIDDLEWARE, *settings.MIDDLEWARE]
    settings.SECURE_CSP = {}
    assert admin_client.get(page("task_changelist"))[HEADER] == STRICT


def test_the_setting_turns_the_policy_off(admin_client: Client, settings):
    settings.KANTHORQ = {"ADMIN_CSP": False}
    response = admin_client.get(page("task_changelist"))
    assert HEADER not in response
    assert response["X-Frame-Options"] == "DENY"


@needs_django_6
def test_the_page_that_asks_takes_the_projects_nonce(admin_client: Client, settings):
    settings.MIDDLEWARE = [CSP_MIDDLEWARE, *settings.MIDDLEWARE]
    settings.SECURE_CSP = {"style-src": ["<CSP_NONCE_SENTINEL>"]}  # CSP.NONCE
    templates = copy.deepcopy(settings.TEMPLATES)
    templates[0]["OPTIONS"]["context_processors"].append("django.template.context_processors.csp")
    settings.TEMPLATES = templates
    asked = tick(admin_client, "cancel", [TaskFactory.create()], select_across="1")
    (nonce,) = re.findall(r"'nonce-([^']+)'", asked[HEADER])
    sheet = re.search(r"<link[^>]*kanthorq_django/admin.css[^>]*>", asked.content.decode())
    assert sheet is not None
    assert f'nonce="{nonce}"' in sheet[0]
