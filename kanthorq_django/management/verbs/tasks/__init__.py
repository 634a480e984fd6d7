"""The verbs of ``manage.py kanthorq tasks``: one selection of tasks, and what to do with it."""

from kanthorq_django.management.verbs.tasks.listing import List
from kanthorq_django.management.verbs.tasks.moving import Cancel, Release, Reset, Resume
from kanthorq_django.management.verbs.tasks.showing import Show
from kanthorq_django.management.verbs.verb import VerbTree

TASKS: VerbTree = {
    "list": List,
    "show": Show,
    "cancel": Cancel,
    "resume": Resume,
    "release": Release,
    "reset": Reset,
}
