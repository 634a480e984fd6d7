"""Fields of the form for schedules: local times, JSON, and text whose secrets are not shown."""

import json
from datetime import datetime
from typing import Any

from django import forms
from django.contrib.admin.widgets import AdminTextareaWidget
from django.core.exceptions import ValidationError
from django.utils.dateparse import parse_datetime
from django.utils.translation import gettext

from kanthorq_django.admin.content import redacted
from kanthorq_django.conf import get_settings
from kanthorq_django.domain.recurrence import YEAR_MAX, YEAR_MIN
from kanthorq_django.domain.redaction import NotRestorable, restore
from kanthorq_django.models.scheduling.definition import EXDATES_MAX


class LocalMomentField(forms.Field):
    """A naive datetime: what a clock of the schedule's zone shows."""

    widget = forms.DateTimeInput(attrs={"type": "datetime-local", "step": "1"})

    def to_python(self, value: Any) -> datetime | None:
        return local_moment(value) if value else None

    def prepare_value(self, value: Any) -> Any:
        return written(value, "T") if isinstance(value, datetime) else value


class LocalMomentsField(forms.Field):
    """Naive datetimes, one in each line."""

    widget = AdminTextareaWidget(attrs={"rows": "4"})

    def to_python(self, value: Any) -> list[datetime]:
        lines = [line.strip() for line in (value or "").splitlines() if line.strip()]
        if len(lines) > EXDATES_MAX:
            raise ValidationError(gettext("At most %d moments can be left out.") % EXDATES_MAX)
        return [local_moment(line) for line in lines]

    def prepare_value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "\n".join(written(moment, " ") for moment in value)


class GuardedTextField(forms.Field):
    """Text of which secrets are not shown; where it comes back without them, they stay stored."""

    stored = ""  # set by the form

    def unguarded(self, value: Any) -> str:
        """Return what was sent with the secrets that were left out of what was shown."""
        sent = (value or "").replace("\r\n", "\n")
        try:
            return restore(sent, self.stored, get_settings().REDACTED_KEYS)
        except NotRestorable as error:
            text = gettext("[redacted] in %s: write out what is to stand there.")
            raise ValidationError(text % error) from error

    def prepare_value(self, value: Any) -> Any:
        return value if isinstance(value, str) else redacted(self.as_text(value))

    def as_text(self, value: Any) -> str:
        raise NotImplementedError

    def has_changed(self, initial: Any, data: Any) -> bool:
        try:
            return bool(initial != self.to_python(data))
        except ValidationError:
            return True


class JsonObjectField(GuardedTextField):
    """A JSON object as text; what Django's own field raises for, it tells."""

    widget = AdminTextareaWidget(attrs={"rows": "4"})

    def to_python(self, value: Any) -> dict[str, Any]:
        text = self.unguarded(value)
        try:
            parsed = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValidationError(gettext("This is not JSON: %s.") % str(error)[:200]) from error
        if not isinstance(parsed, dict):
            raise ValidationError(gettext('Write a JSON object, such as {"team": "sales"}.'))
        return parsed

    def as_text(self, value: Any) -> str:
        return json.dumps(value or {}, indent=2, ensure_ascii=False)


class BodyField(GuardedTextField):
    """Text that is stored in UTF-8, with the line ends that people mean."""

    widget = AdminTextareaWidget

    def to_python(self, value: Any) -> bytes:
        try:
            return self.unguarded(value).encode()
        except UnicodeEncodeError as error:
            raise ValidationError(gettext("This holds half a character.")) from error

    def as_text(self, value: Any) -> str:
        return bytes(value or b"").decode(errors="replace").replace("\r\n", "\n")

    def has_changed(self, initial: Any, data: Any) -> bool:
        return super().has_changed(self.as_text(initial).encode(), data)


def local_moment(text: str) -> datetime:
    """Return ``text`` as a naive datetime. Raises ValidationError, in words."""
    try:
        # A mere date would be taken for its midnight, when hardly anything occurs.
        moment = parse_datetime(text.strip()) if ":" in text else None
    except ValueError:
        moment = None
    if moment is None:
        message = gettext("%(text)s is not a time; write it as 2026-12-24 09:00.")
        raise ValidationError(message % {"text": ascii(text[:40])})
    if moment.tzinfo is not None:
        raise ValidationError(gettext("Leave the offset out: times are those of the time zone."))
    if not YEAR_MIN <= moment.year <= YEAR_MAX:
        bounds = {"min": YEAR_MIN, "max": YEAR_MAX}
        raise ValidationError(gettext("The year must be %(min)d to %(max)d.") % bounds)
    return moment.replace(microsecond=0)


def written(moment: datetime, separator: str) -> str:
    return moment.isoformat(separator, "seconds" if moment.second else "minutes")
