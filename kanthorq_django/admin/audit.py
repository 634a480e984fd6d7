"""The audit: what operators did. Read only, for everybody."""

from typing import Any, ClassVar

from django.contrib import admin
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.content import pretty_value
from kanthorq_django.admin.display import (
    NOTHING,
    exact_moment,
    moment,
    number,
    preformatted,
    visible,
)
from kanthorq_django.admin.readonly import ReadOnlyAdmin
from kanthorq_django.models import OperatorAction

# What was done comes before what was left alone; jsonb sorts its keys by their length.
PLACES = {"updated": 0, "requested": 1, "noop": 3}
ELSEWHERE = 2


@admin.register(OperatorAction)
class OperatorActionAdmin(ReadOnlyAdmin):
    """Rows come with the changes that they tell of, and go with prune."""

    list_display = ("action", "told_counts", "operator", "origin", "when", "told_reason")
    list_filter = ("origin",)
    ordering = ("-id",)
    sortable_by = ()
    search_fields = ("action__startswith", "operator__startswith")
    search_help_text = _("The beginning of an action, such as tasks.cancel, or of an operator.")
    fields = (
        "action",
        "told_counts",
        "operator",
        "user_id",
        "origin",
        "exactly",
        "told_reason",
        "told_selection",
        "told_sample",
    )
    labels: ClassVar = {"user_id": _("user ID")}

    @admin.display(description=_("changes"))
    def told_counts(self, action: OperatorAction) -> str:
        told = sorted(action.counts.items(), key=lambda item: PLACES.get(item[0], ELSEWHERE))
        return ", ".join(_counted(word, count) for word, count in told if count) or NOTHING

    @admin.display(description=_("reason"))
    def told_reason(self, action: OperatorAction) -> str:
        return visible(action.reason) or NOTHING

    @admin.display(description=_("when"))
    def when(self, action: OperatorAction) -> str:
        return moment(action.created_at)

    @admin.display(description=_("when"))
    def exactly(self, action: OperatorAction) -> str:
        return exact_moment(action.created_at)

    @admin.display(description=_("selection"))
    def told_selection(self, action: OperatorAction) -> str:
        return _as_json(action.selection)

    @admin.display(description=_("some of what was changed"))
    def told_sample(self, action: OperatorAction) -> str:
        return _as_json(action.sample)


def _counted(word: str, count: int) -> str:
    """Return ``3 updated``, or ``1 task`` where rows hold a noun, in the plural."""
    texts = {
        "added": gettext("%s added"),
        "changed": gettext("%s changed"),
        "consumers": ngettext("%s consumer", "%s consumers", count),
        "created": gettext("%s created"),
        "deleted": gettext("%s deleted"),
        "events": ngettext("%s event", "%s events", count),
        "fields": ngettext("%s field", "%s fields", count),
        "noop": gettext("%s noop"),
        "published": gettext("%s published"),
        "requested": gettext("%s requested"),
        "tasks": ngettext("%s task", "%s tasks", count),
        "updated": gettext("%s updated"),
    }
    text = texts.get(word)
    return f"{number(count)} {word}" if text is None else text % number(count)


def _as_json(value: Any) -> str:
    return preformatted(pretty_value(value))
