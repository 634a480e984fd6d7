"""Addresses, and what a browser would send."""

import re
from collections.abc import Iterable
from html import unescape
from typing import Any

from django.contrib.messages import get_messages
from django.test import Client
from django.urls import reverse

from kanthorq_django.models import Task


def page(name: str, *args: object) -> str:
    """Return the address of an admin page such as ``task_changelist``."""
    return reverse(f"admin:kanthorq_django_{name}", args=args)


def tick(client: Client, verb: str, tasks: Iterable[Task], **more: Any) -> Any:
    """Tick ``tasks`` in the list and run the action ``verb`` on them."""
    selected = [str(task.pk) for task in tasks]
    data = {"action": verb, "index": "0", "select_across": "0", "_selected_action": selected}
    return client.post(page("task_changelist"), data | more)


def ask_for_all(client: Client, verb: str, query: str = "") -> Any:
    """Choose "select all" in the list, filtered by ``query``, and run the action."""
    some = Task.objects.values_list("pk", flat=True).first()
    data = {"action": verb, "index": "0", "select_across": "1", "_selected_action": [str(some)]}
    return client.post(page("task_changelist") + query, data)


def answer(client: Client, asked: Any, query: str = "", **changed: str) -> Any:
    """Send the form of the page that asked about rows of the list."""
    return client.post(page("task_changelist") + query, _hidden(asked) | changed)


def agree(client: Client, response: Any) -> Any:
    """Send the form of the page to where it came from; return a response that asks nothing."""
    if response.status_code != 200:
        return response
    return client.post(response.wsgi_request.get_full_path(), _hidden(response))


def press(client: Client, verb: str, task: Task, **more: str) -> Any:
    """Press the button ``verb`` on the task's page."""
    return client.post(page(f"task_{verb}", task.pk), more)


def told(response: Any) -> list[tuple[str, str]]:
    """Return the (level, text) of each message that the user gets to see, without markup."""
    return [
        (message.level_tag, _without_markup(str(message)))
        for message in get_messages(response.wsgi_request)
    ]


def text_of(response: Any) -> str:
    """Return the page's text without its markup."""
    return _without_markup(response.content.decode())


def texts_between(response: Any, *labels: str) -> list[str]:
    """Return what stands between each label and the next one: a value, and what explains it.

    Which of the two comes first is up to the release of Django.
    """
    left = text_of(response).partition(labels[0])[2]
    found = []
    for label in labels[1:]:
        text, known, left = left.partition(label)
        assert known, label
        found.append(text)
    return found


def _hidden(asked: Any) -> dict[str, list[str]]:
    """Return the hidden fields of the page's form; some are there several times."""
    fields: dict[str, list[str]] = {}
    found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', asked.content.decode())
    for name, value in found:
        if name != "csrfmiddlewaretoken":
            fields.setdefault(name, []).append(unescape(value))
    return fields


def _without_markup(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())
