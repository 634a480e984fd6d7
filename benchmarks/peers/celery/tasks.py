"""The app and its tasks."""

import os

from celery import Celery

from benchmarks.peers import django_app, django_handlers

django_app.set_up()
app = Celery("bench", broker=os.environ["BENCH_BROKER"])
app.conf.task_ignore_result = True
app.conf.CELERY_DB_REUSE_MAX = 1_000_000  # or it connects anew for each task

TASKS = {
    handler.__name__: app.task(name=handler.__name__)(handler)
    for handler in (
        django_handlers.warm,
        django_handlers.noop,
        django_handlers.insert,
        django_handlers.ping,
    )
}
