"""The app and its tasks; what does not block is a coroutine, which procrastinate runs faster."""

import logging

import procrastinate

from benchmarks.peers import django_app, django_handlers
from benchmarks.peers.adapter import dsn

django_app.set_up()
logging.getLogger("procrastinate").setLevel(logging.WARNING)

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn()))
insert = app.task(name="insert")(django_handlers.insert)


@app.task(name="warm")
async def warm(number: int) -> None:
    django_handlers.warm(number)


@app.task(name="noop")
async def noop(number: int) -> None:
    django_handlers.noop(number)


@app.task(name="ping")
async def ping(number: int) -> None:
    django_handlers.ping(number)
