"""All works by name, in the order in which they run."""

from __future__ import annotations

from benchmarks.works.drain import Drain
from benchmarks.works.latency import Latency
from benchmarks.works.publishing import PublishMany, PublishOneByOne
from benchmarks.works.work import Comparison, Goal, Metric, Work

RATE = Metric(name="rate", unit="/s")
DELAYS = tuple(Metric(name=name, unit="ms", is_better_when_higher=False) for name in ("p50", "p99"))

WORKS: tuple[Work, ...] = (
    Drain(
        Comparison(
            name="noop",
            title="Drain of jobs that do nothing, one worker process",
            metrics=(RATE,),
            reference="pgqueuer",
            goals=(Goal(label="kanthorq", metric="rate", ratio=2.0),),
        ),
        work="noop",
    ),
    Drain(
        Comparison(
            name="noop2",
            title="Drain of jobs that do nothing, two worker processes",
            metrics=(RATE,),
            reference="pgqueuer",
        ),
        work="noop",
        processes=2,
    ),
    Drain(
        Comparison(
            name="insert",
            title="One row by Django's ORM per job, one worker process",
            metrics=(RATE,),
            goals=(
                Goal(label="kanthorq, atomic=True", metric="rate", ratio=1.5),
                Goal(label="kanthorq, batch and bulk_create", metric="rate", ratio=10),
            ),
        ),
        work="insert",
        writes_effects=True,
    ),
    PublishOneByOne(
        Comparison(
            name="publish",
            title="Publish one by one, each with a commit of its own",
            metrics=(RATE,),
            reference="bare psycopg INSERT",
            goals=(Goal(label="kanthorq", metric="rate", ratio=0.85),),
        )
    ),
    PublishMany(
        Comparison(
            name="many",
            title="Publish 10,000 at once",
            metrics=(RATE,),
            reference="pgqueuer",
            goals=(Goal(label="kanthorq", metric="rate", ratio=2.5),),
        )
    ),
    Latency(
        Comparison(
            name="latency",
            title="From publishing to the handler of an idle worker",
            metrics=DELAYS,
            reference="pgqueuer",
            goals=(
                Goal(label="kanthorq", metric="p50", ratio=1.0),
                Goal(label="kanthorq", metric="p99", ratio=1.0),
            ),
        )
    ),
)
