"""The broker and its actors."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.peers import django_app, django_handlers

django_app.set_up()
dramatiq.set_broker(RedisBroker(url=os.environ["BENCH_BROKER"]))

TASKS = {
    handler.__name__: dramatiq.actor(handler)
    for handler in (
        django_handlers.warm,
        django_handlers.noop,
        django_handlers.insert,
        django_handlers.ping,
    )
}
