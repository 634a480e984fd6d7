"""The verbs of ``manage.py kanthorq``, a file each."""

from kanthorq_django.management.verbs.grants import Grants
from kanthorq_django.management.verbs.health import Health
from kanthorq_django.management.verbs.prune import Prune
from kanthorq_django.management.verbs.publish import Publish
from kanthorq_django.management.verbs.rebase import Rebase
from kanthorq_django.management.verbs.reencrypt import Reencrypt
from kanthorq_django.management.verbs.schedules import SCHEDULES
from kanthorq_django.management.verbs.stats import Stats
from kanthorq_django.management.verbs.sync import Sync
from kanthorq_django.management.verbs.tasks import TASKS
from kanthorq_django.management.verbs.verb import VerbTree

VERBS: VerbTree = {
    "publish": Publish,
    "sync": Sync,
    "stats": Stats,
    "health": Health,
    "tasks": ("Look at tasks, and cancel, resume, release or reset them.", TASKS),
    "schedules": ("Look at schedules, and cancel or resume them.", SCHEDULES),
    "prune": Prune,
    "grants": Grants,
    "rebase": Rebase,
    "reencrypt": Reencrypt,
}
