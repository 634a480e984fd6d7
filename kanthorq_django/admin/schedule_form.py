"""The form in which people write schedules."""

import copy
import functools
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, available_timezones

from django import forms
from django.conf import settings
from django.contrib.admin.widgets import AdminTextInputWidget
from django.core.exceptions import NON_FIELD_ERRORS
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.schedule_fields import (
    BodyField,
    GuardedTextField,
    JsonObjectField,
    LocalMomentField,
    LocalMomentsField,
    written,
)
from kanthorq_django.domain.recurrence import Recurrence
from kanthorq_django.exceptions import InvalidSchedule
from kanthorq_django.models import Schedule
from kanthorq_django.models.scheduling.definition import readable_exdates, stored_exdates, zone_of
from kanthorq_django.models.scheduling.occurrences import MOMENT

STRAYS_SOUGHT_MAX = 20

if TYPE_CHECKING:
    _ModelForm = forms.ModelForm[Schedule]
else:
    _ModelForm = forms.ModelForm


@functools.cache
def zone_choices() -> list[tuple[str, str]]:
    """Return the names of all time zones; looking for them reads many files."""
    return [(name, name) for name in sorted(available_timezones())]


class ScheduleForm(_ModelForm):
    """Turns local times into moments once the zone is known; the model checks the rest."""

    rrule = forms.CharField(
        label=_("Recurrence rule"),
        max_length=500,
        widget=AdminTextInputWidget(attrs={"class": "vLargeTextField"}),
        help_text=_(
            "As in RFC 5545: FREQ=DAILY, FREQ=WEEKLY;BYDAY=MO,WE;BYHOUR=9;BYMINUTE=0, "
            "FREQ=MONTHLY;BYMONTHDAY=-1;COUNT=12. What it leaves open it takes from the start."
        ),
    )
    dtstart = LocalMomentField(
        label=_("Starts at"),
        help_text=_(
            "What the clocks of the time zone show; of an hour that comes twice, the first."
        ),
    )
    timezone = forms.ChoiceField(label=_("Time zone"), choices=zone_choices)
    exdates = LocalMomentsField(
        label=_("Left out"),
        required=False,
        help_text=_("Occurrences to leave out, one in each line: 2026-12-24 09:00"),
    )
    metadata = JsonObjectField(
        label=_("Metadata"),
        required=False,
        help_text=_('A JSON object; each event gets "schedule" and "occurrence" beside it.'),
    )
    body = BodyField(
        label=_("Body"),
        required=False,
        help_text=_("Text or JSON, published as it stands."),
    )

    class Meta:
        model = Schedule
        fields = (
            "name",
            "stream",
            "subject",
            "body",
            "metadata",
            "resource_key",
            "rrule",
            "dtstart",
            "timezone",
            "exdates",
            "catchup",
        )
        help_texts = {
            "stream": _("A stream is made by its first publisher or consumer."),
            "catchup": _("What becomes of those that pass while no worker runs."),
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kept: Any = self.instance
        if kept._state.adding:
            self.initial.setdefault("timezone", settings.TIME_ZONE)
            return
        # What the page tells beside the form is of what is stored, also when the form is wrong.
        kept.as_stored = copy.copy(kept)
        self._guard("body", "metadata")
        self.initial["dtstart"] = _naive(kept, kept.dtstart)
        self.initial["exdates"] = [_naive(kept, moment) for moment in readable_exdates(kept)]
        # A zone that is not known here any more is kept until somebody chooses another one.
        zones = zone_choices()
        if (kept.timezone, kept.timezone) not in zones:
            choosing: Any = self.fields["timezone"]
            choosing.choices = [(kept.timezone, kept.timezone), *zones]

    def _guard(self, *names: str) -> None:
        for name in names:
            field = self.fields.get(name)  # a body that is no text is no field
            if isinstance(field, GuardedTextField):
                field.stored = field.as_text(self.initial.get(name))

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        for column in {"body", "dtstart", "exdates"} & cleaned.keys():
            if not self._has_new(column):
                cleaned[column] = getattr(self.instance, column)
        try:
            zone = zone_of(cleaned.get("timezone", ""))
        except InvalidSchedule:
            zone = ZoneInfo("UTC")  # what is wrong is told at its field
        self._settle_moments(cleaned, zone)
        return cleaned

    def add_error(self, field: str | None, error: Any) -> None:
        """Tell what is wrong with a column that this form does not show at the top of the form."""
        if field is None and hasattr(error, "error_dict"):
            for name in error.error_dict.keys() - {*self.fields, NON_FIELD_ERRORS}:
                self.add_error(None, error.error_dict.pop(name))
            if not error.error_dict:
                return
        super().add_error(field, error)

    def _has_new(self, column: str) -> bool:
        if self.instance._state.adding or column in self.changed_data:
            return True
        return column in ("dtstart", "exdates") and "timezone" in self.changed_data

    def _settle_moments(self, cleaned: dict[str, Any], zone: ZoneInfo) -> None:
        dtstart = cleaned.get("dtstart")
        if dtstart is not None and self._has_new("dtstart"):
            cleaned["dtstart"] = _first(dtstart, zone)
            if cleaned["dtstart"].astimezone(zone).replace(tzinfo=None) != dtstart:
                text = gettext("The clocks of %s skip this time on that day.") % zone.key
                self.add_error("dtstart", text)
        if "exdates" in cleaned and self._has_new("exdates"):
            cleaned["exdates"] = stored_exdates(
                _first(moment, zone) for moment in cleaned["exdates"]
            )


def _first(moment: datetime, zone: ZoneInfo) -> datetime:
    return moment.replace(tzinfo=zone, fold=0).astimezone(UTC)


def _naive(schedule: Schedule, moment: datetime) -> datetime:
    return schedule.local(moment).replace(tzinfo=None, microsecond=0)


def strays(schedule: Schedule) -> list[str]:
    """Return which of the moments left out, of the first few, are no occurrences anyway."""
    every = Recurrence(schedule.rrule, schedule.dtstart, zone_of(schedule.timezone))
    moments = readable_exdates(schedule)[:STRAYS_SOUGHT_MAX]
    return [
        written(_naive(schedule, moment), " ")
        for moment in moments
        if every.after(moment - MOMENT) != moment
    ]


def json_problem(body: bytes) -> str | None:
    """Return why ``body``, which begins as JSON does, is none; None if it is, or is no JSON."""
    text = body.decode(errors="replace")
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return str(error)
    return None
