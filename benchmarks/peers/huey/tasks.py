"""The instance and its tasks, on Redis if the run has one."""

import os

from huey import PostgresHuey, RedisHuey

from benchmarks.peers import django_app, django_handlers
from benchmarks.peers.adapter import dsn

django_app.set_up()

if url := os.environ.get("BENCH_BROKER"):
    huey = RedisHuey(url=url, results=False)
else:
    huey = PostgresHuey(dsn=dsn(), results=False)

TASKS = {
    handler.__name__: huey.task()(handler)
    for handler in (
        django_handlers.warm,
        django_handlers.noop,
        django_handlers.insert,
        django_handlers.ping,
    )
}
