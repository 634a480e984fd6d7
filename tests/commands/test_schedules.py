from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.management.base import CommandError
from django.utils import timezone

from kanthorq_django import schedule
from kanthorq_django.models import Schedule
from tests.commands.console import kanthorq, on_terminal

pytestmark = pytest.mark.django_db

START = datetime(2026, 1, 5, 8, tzinfo=UTC)  # a Monday, 09:00 in Berlin


def weekly(name: str = "weekly-report", **given: Any) -> Schedule:
    options: dict[str, Any] = {
        "rrule": "FREQ=WEEKLY;BYDAY=MO",
        "dtstart": START,
        "timezone": "Europe/Berlin",
        "subject": "report.weekly",
        "stream": "reports",
    }
    return schedule(name, **(options | given))


def lives() -> dict[str, str]:
    return {kept.name: kept.life for kept in Schedule.objects.all()}


class TestList:
    def test_a_line_tells_the_next_occurrence_and_the_rule_in_words(self):
        kept = weekly()

        head, line = kanthorq("schedules", "list").lines

        assert head.split() == ["NAME", "STATE", "NEXT", "LAST", "STREAM", "SUBJECT", "RULE"]
        assert line.split()[:2] == ["weekly-report", "active"]
        assert kept.next_at is not None
        local = kept.next_at.astimezone(ZoneInfo("Europe/Berlin"))
        assert f"  {local.isoformat(sep=' ')}  -  " in line
        assert line.endswith("reports  report.weekly  every week on Monday at 09:00")

    def test_a_schedule_is_active_cancelled_or_ended(self):
        for name in ("active", "cancelled", "ended"):
            weekly(name, rrule="FREQ=DAILY;COUNT=1" if name == "ended" else "FREQ=DAILY")
        Schedule.objects.filter(name="cancelled").cancel()

        told = kanthorq("schedules", "list", "--json").json

        assert [each["state"] for each in told] == ["active", "cancelled", "ended"]
        assert [each["next_at"] is None for each in told] == [False, True, True]

    def test_names_choose_and_a_wrong_one_gets_near_ones(self):
        weekly("daily"), weekly("weekly")

        (told,) = kanthorq("schedules", "list", "daily", "--json").json
        assert told["name"] == "daily"
        with pytest.raises(CommandError, match=r"no schedule 'weeekly'.*did you mean 'weekly'"):
            kanthorq("schedules", "list", "weeekly")

    def test_without_schedules_there_is_only_the_head(self):
        assert len(kanthorq("schedules", "list").lines) == 1
        assert kanthorq("schedules", "list", "--json").json == []


class TestShow:
    def test_the_next_five_are_told_in_the_zone_of_the_schedule(self):
        kept = weekly()

        shown = kanthorq("schedules", "show", "weekly-report")
        (told,) = kanthorq("schedules", "show", "weekly-report", "--json").json

        upcoming = [datetime.fromisoformat(text) for text in told["upcoming"]]
        assert upcoming == kept.upcoming(5)
        assert {(moment.weekday(), moment.hour) for moment in upcoming} == {(0, 9)}
        nexts = [line for line in shown.lines if line.split()[0] == "next"]
        assert len(nexts) == 5
        assert all(" Mon " in line and " 09:00:00 CE" in line for line in nexts)

    def test_the_definition_is_told_without_the_body(self):
        moment = START + timedelta(weeks=2)
        weekly(body="secret", metadata={"by": "ops"}, exdates=[moment], resource_key="r-1")

        ran = kanthorq("schedules", "show", "weekly-report")

        for fact in (
            "every week on Monday at 09:00 (FREQ=WEEKLY;BYDAY=MO)",
            "Europe/Berlin",
            "Mon 2026-01-19 09:00:00 CET",
            "publish the last one",
            '{"by": "ops"}',
            "r-1",
            "6 bytes",
        ):
            assert fact in ran.out
        assert "secret" not in ran.out

    def test_what_cannot_be_read_any_more_is_shown_all_the_same(self):
        weekly()
        Schedule.objects.update(timezone="Gone/Zone", rrule="FREQ=FORTNIGHTLY")

        ran = kanthorq("schedules", "show", "weekly-report")

        assert "FREQ=FORTNIGHTLY" in ran.out
        assert kanthorq("schedules", "list").lines[1].endswith("FREQ=FORTNIGHTLY")

    def test_several_stand_one_after_the_other(self):
        weekly("a"), weekly("b")
        lines = kanthorq("schedules", "show", "b", "a").lines
        assert [line for line in lines if line and not line.startswith(" ")] == ["b", "a"]
        assert lines.count("") == 1

    def test_it_wants_a_name(self):
        with pytest.raises(CommandError, match="NAME"):
            kanthorq("schedules", "show")


class TestMoving:
    def test_cancel_and_resume_tell_each_name(self):
        weekly("a"), weekly("b")
        Schedule.objects.filter(name="b").cancel()

        dry = kanthorq("schedules", "cancel", "a", "b", "--dry-run")
        assert lives() == {"a": "active", "b": "cancelled"}
        ran = kanthorq("schedules", "cancel", "a", "b", "--yes")

        assert dry.words == [["would-update", "a"], ["noop", "b"]]
        assert dry.err == "Dry run, nothing was changed: 1 updated, 1 noop.\n"
        assert ran.words == [["updated", "a"], ["noop", "b"]]
        assert ran.err == "1 updated, 1 noop.\n"
        assert kanthorq("schedules", "resume", "b", "--yes", "--json").json == {
            "verb": "resume",
            "dry_run": False,
            "updated": ["b"],
            "noop": [],
        }
        assert lives() == {"a": "cancelled", "b": "active"}

    def test_resume_goes_on_from_now(self):
        weekly(catchup="all")
        kanthorq("schedules", "cancel", "weekly-report", "--yes")
        kanthorq("schedules", "resume", "weekly-report", "--yes")

        (kept,) = Schedule.objects.all()
        assert kept.next_at is not None
        assert kept.next_at > timezone.now()

    @pytest.mark.parametrize("verb", ["cancel", "resume"])
    @pytest.mark.parametrize("arguments", [(), ("--yes",), ("--all",)])
    def test_without_names_it_refuses_to_act(self, verb: str, arguments: tuple[str, ...]):
        weekly()

        with pytest.raises(CommandError, match="--all together with --yes"):
            kanthorq("schedules", verb, *arguments)

        assert lives() == {"weekly-report": "active"}

    def test_all_of_them_with_yes(self):
        weekly("a"), weekly("b")
        assert len(kanthorq("schedules", "cancel", "--all", "--yes").lines) == 2
        assert set(lives().values()) == {"cancelled"}

    def test_without_a_terminal_and_without_yes_it_refuses(self):
        weekly()
        with pytest.raises(CommandError, match="add --yes, or --dry-run"):
            kanthorq("schedules", "cancel", "weekly-report")
        assert lives() == {"weekly-report": "active"}

    def test_an_unknown_name_moves_nothing(self):
        weekly()
        with pytest.raises(CommandError, match="no schedule 'monthly'"):
            kanthorq("schedules", "cancel", "weekly-report", "monthly", "--yes")
        assert lives() == {"weekly-report": "active"}

    @pytest.mark.parametrize(
        ("broken", "told"),
        [
            ({"timezone": "Gone/Zone"}, r"'Gone/Zone' is not the name of a time zone\."),
            ({"rrule": "FREQ=FORTNIGHTLY"}, "FREQ must be one of"),
            ({"exdates": {}}, r"exdates must be a list, not dict\."),
        ],
    )
    def test_what_cannot_be_resumed_is_one_sentence_that_names_it(
        self, broken: dict[str, Any], told: str
    ):
        weekly("daily"), weekly()
        Schedule.objects.all().cancel()
        Schedule.objects.filter(name="weekly-report").update(**broken)
        with pytest.raises(CommandError, match=f"^Schedule 'weekly-report': {told}"):
            kanthorq("schedules", "resume", "--all", "--yes")
        assert set(lives().values()) == {"cancelled"}


@pytest.mark.django_db(transaction=True)
def test_yes_on_a_terminal_cancels():
    weekly()

    ran = on_terminal(
        "schedules", "cancel", "weekly-report", question="Cancel 1 schedule? [y/N] ", answer="y"
    )

    assert ran.status == 0
    assert "updated       weekly-report" in ran.out
    assert lives() == {"weekly-report": "cancelled"}
