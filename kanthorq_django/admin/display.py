"""How values look: text that cannot deceive, badges, moments, links to other pages."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from django.contrib.humanize.templatetags.humanize import naturaltime
from django.urls import NoReverseMatch, reverse
from django.utils import timezone
from django.utils.formats import date_format, number_format
from django.utils.html import format_html, format_html_join
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext

from kanthorq_django.domain.moments import told_in
from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.task import STATE_LABELS

NOTHING = "—"
FEW = 3  # names that are read at a glance
_NOT_A_LINE = re.compile(r"[^\n\t]")


class Estimate(int):
    """A number that nobody counted, and that says so wherever a template prints it."""

    def __str__(self) -> str:
        return f"≈ {number(int(self))}"


class Minimum(int):
    """A number at which counting stopped, and that says so wherever a template prints it."""

    def __str__(self) -> str:
        return f"{number(int(self))}+"


def number(count: int) -> str:
    """Return ``count`` for people, with the reader's separators."""
    return str(count) if type(count) is not int else number_format(count, force_grouping=True)


def yes_or_no(is_so: bool) -> str:
    """Return the word: Django's red cross would make a failure of what is merely off."""
    return gettext("yes") if is_so else gettext("no")


def visible(text: str) -> str:
    """Return ``text`` with every character spelled out that would hide, or turn others around."""
    if text.isprintable():
        return text
    return _NOT_A_LINE.sub(lambda found: _spelled(found.group()), text)


def _spelled(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def preformatted(text: str) -> SafeString:
    """Return ``text`` with its lines as they are; by the keyboard too, one can scroll it."""
    return format_html('<pre class="kq-content" tabindex="0">{}</pre>', text)


def badge(text: object, kind: str) -> SafeString:
    """Return ``text`` as a pill; its colour is the style sheet's affair."""
    return format_html('<span class="kq-badge kq-{}">{}</span>', kind, text)


def state_badge(state: int, *, is_stuck: bool = False, is_asked: bool = False) -> SafeString:
    """Return the state as a pill; stuck is a running task whose lease ran out.

    One ``is_asked`` if it was asked to stop.
    """
    known = TaskState(state)
    told, kind = [str(STATE_LABELS[known])], known.name.lower()
    if is_asked:
        told, kind = [*told, gettext("asked to stop")], "cancelling"
    if is_stuck:
        told, kind = [*told, gettext("stuck")], "stuck"
    return badge(", ".join(told), kind)


def moment(when: datetime | None) -> str:
    """Return how long ago or how soon ``when`` is; the exact time is its tooltip."""
    if when is None:
        return NOTHING
    local = told_in(timezone.get_current_timezone(), when)
    return format_html(
        '<time datetime="{}" title="{}">{}</time>',
        local.isoformat(timespec="seconds"),
        f"{date_format(local, 'DATETIME_FORMAT')} {local.tzname() or ''}".strip(),
        naturaltime(when),
    )


def exact_moment(when: datetime | None) -> str:
    """Return ``when`` to the millisecond, and how long ago or how soon that is."""
    if when is None:
        return NOTHING
    local = told_in(timezone.get_current_timezone(), when)
    text = local.isoformat(sep=" ", timespec="milliseconds")
    return format_html('<time datetime="{}">{}</time> ({})', text, text, naturaltime(when))


def link(url: str | None, text: object) -> str:
    """Return ``text`` as a link, or as it is when there is no page to lead to."""
    return format_html('<a href="{}">{}</a>', url, text) if url else format_html("{}", text)


def page_url(
    site: str, page: str, *args: object, query: Mapping[str, str | int] | None = None
) -> str | None:
    """Return the address of ``page``, such as ``task_change``, in the admin site ``site``.

    None when the project has unregistered it.
    """
    try:
        url = reverse(f"admin:kanthorq_django_{page}", args=args, current_app=site)
    except NoReverseMatch:
        return None
    return f"{url}?{urlencode(query)}" if query else url


def disclosed(title: str, names: Sequence[str], count: int) -> SafeString:
    """Return ``names``, the first of ``count``, under ``title``; many are shown once it is opened.

    Nothing without names.
    """
    if not names:
        return SafeString("")
    others = count - len(names)
    more = ngettext(" and %d other", " and %d others", others) % others if others > 0 else ""
    return format_html(
        '<details class="kq-disclosed"{}><summary>{}</summary>{}{}</details>',
        SafeString(" open" if len(names) <= FEW else ""),
        title,
        format_html_join(" ", "<span>{}</span>", ((name,) for name in names)),
        more,
    )
