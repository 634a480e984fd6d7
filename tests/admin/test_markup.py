import re
from datetime import UTC, datetime

import pytest
from django.contrib.staticfiles import finders
from django.test import Client

from kanthorq_django import schedule
from kanthorq_django.models import OperatorAction, TaskState, Worker
from kanthorq_django.models.audit import Order
from tests.admin.pages import page
from tests.factories import TaskFactory

pytestmark = pytest.mark.django_db

# What "default-src 'self'" would stop: code and style within the page, and what others serve.
INLINE = re.compile(
    r"""<script(?![^>]*\ssrc=)[^>]*>|<style|\sstyle\s*=|\son\w+\s*=\s*["']|javascript:|(?:src|href)="(?:https?:)?//""",
    re.IGNORECASE,
)


@pytest.fixture
def pages(admin_client: Client) -> dict[str, str]:
    failure = {"at": "2030-01-01", "attempt": 1, "verb": "cancel", "error": "E", "stack": "S"}
    task = TaskFactory.create(
        state=TaskState.DISCARDED, attempted_errors=[failure], result={"sent": 1}
    )
    worker = Worker.objects.create(host="shop-1", pid=42, concurrency=10, consumers=["emails"])
    planned = schedule(
        "report", rrule="FREQ=DAILY", dtstart=datetime(2026, 1, 1, tzinfo=UTC), subject="report.due"
    )
    order = Order(operator="ann", origin=OperatorAction.Origin.ADMIN, selection={"q": ["<b>"]})
    order.record("tasks.cancel", using="default", counts={"updated": 1}, ids=[task.event_id])
    action = OperatorAction.objects.get()
    rows = {
        "stream": task.consumer.stream_id,
        "event": task.event_id,
        "consumer": task.consumer_id,
        "task": task.pk,
        "worker": worker.pk,
        "schedule": planned.pk,
        "operatoraction": action.pk,
    }
    addresses = [page(f"{noun}_changelist") for noun in rows]
    addresses += [page(f"{noun}_change", pk) for noun, pk in rows.items()]
    addresses += [page("consumer_delete", task.consumer_id), page("schedule_add")]
    found = {address: admin_client.get(address).content.decode() for address in addresses}
    data = {"action": "resume", "index": "0", "select_across": "1", "_selected_action": [task.pk]}
    asked = admin_client.post(page("task_changelist"), data)
    return found | {"select all": asked.content.decode()}


def test_no_page_needs_a_hole_in_a_strict_content_security_policy(pages: dict[str, str]):
    assert {address: INLINE.findall(html) for address, html in pages.items()} == {
        address: [] for address in pages
    }


def test_every_page_uses_the_style_sheet_which_is_there(pages: dict[str, str]):
    for address, html in pages.items():
        assert "kanthorq_django/admin.css" in html, address
    assert finders.find("kanthorq_django/admin.css")


def test_tables_have_header_cells_with_a_scope(pages: dict[str, str]):
    tables = [
        table
        for html in pages.values()
        for table in re.findall(r"<table(?! id=\"result_list\").*?</table>", html, re.DOTALL)
        if "kq-" in table
    ]
    assert tables
    for table in tables:
        assert '<th scope="col">' in table
        assert '<th scope="row">' in table


def test_nothing_is_told_by_colour_alone(pages: dict[str, str]):
    badges = re.findall(r'<span class="kq-badge[^"]*">(.*?)</span>', "".join(pages.values()))
    assert badges
    assert all(text.strip() for text in badges)


def test_what_can_be_scrolled_is_reached_by_the_keyboard(pages: dict[str, str]):
    scrolling = re.compile(r'<pre[^>]*>|<div class="kq-scroll"[^>]*>')
    blocks = [each for html in pages.values() for each in scrolling.findall(html)]
    assert blocks
    assert all('tabindex="0"' in block for block in blocks)


def test_the_table_of_a_question_scrolls_in_a_narrow_window(pages: dict[str, str]):
    assert re.search(r'<div class="kq-scroll"[^>]*>\s*<table>', pages["select all"])
