"""All works by name, in the order in which they run."""

from __future__ import annotations

from benchmarks.works.asking import Asking, Cancelling
from benchmarks.works.catching_up import CatchingUp
from benchmarks.works.crowd import Crowd
from benchmarks.works.drain import Drain
from benchmarks.works.footprint import Footprint
from benchmarks.works.idling import Idle
from benchmarks.works.latency import Latency
from benchmarks.works.publishing import PublishMany, PublishOneByOne
from benchmarks.works.work import Comparison, Goal, JointWork, Metric, Work

RATE = Metric(name="rate", unit="/s")
DURATIONS = (
    Metric(name="time", unit="ms", is_better_when_higher=False),
    Metric(name="each", unit="us", is_better_when_higher=False),
)
FLATNESS = Metric(name="flatness", unit="")
DELAYS = tuple(Metric(name=name, unit="ms", is_better_when_higher=False) for name in ("p50", "p99"))
LONGEST = Metric(name="max", unit="ms", is_better_when_higher=False)
COSTS = (
    Metric(name="cpu", unit="% of a core", is_better_when_higher=False),
    Metric(name="transactions", unit="/s", is_better_when_higher=False),
)
SIZES = (
    Metric(name="memory", unit="MiB", is_better_when_higher=False),
    Metric(name="growth", unit="MiB", is_better_when_higher=False),
    Metric(name="start", unit="s", is_better_when_higher=False),
)

DEFAULT: tuple[Work | JointWork, ...] = (
    Drain(
        comparison=Comparison(
            name="noop",
            title="Drain of jobs that do nothing, one worker process",
            metrics=(RATE,),
            reference="pgqueuer",
            goals=(Goal(label="kanthorq", metric="rate", ratio=2.0),),
        ),
    ),
    Drain(
        comparison=Comparison(
            name="noop2",
            title="Drain of jobs that do nothing, two worker processes",
            metrics=(RATE,),
            reference="pgqueuer",
        ),
        processes=2,
    ),
    Drain(
        comparison=Comparison(
            name="insert",
            title="One row by Django's ORM per job, one worker process",
            metrics=(RATE,),
            goals=(
                Goal(label="kanthorq, atomic=True", metric="rate", ratio=1.5),
                Goal(label="kanthorq, atomic=True, GROUP_COMMIT=20", metric="rate", ratio=1.5),
                Goal(label="kanthorq, batch and bulk_create", metric="rate", ratio=10),
            ),
        ),
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
LONG: tuple[Work | JointWork, ...] = (
    Crowd(
        Comparison(
            name="crowd",
            title="Commits of eight publishers, with and without listeners",
            metrics=(RATE,),
            reference="nobody listens, NOTIFY off",
            goals=(Goal(label="4 sessions listen", metric="rate", ratio=0.97),),
        )
    ),
    Idle(
        Comparison(
            name="idle",
            title="What an idle worker costs",
            metrics=COSTS,
            goals=(
                Goal(label="kanthorq", metric="cpu", value=0.5),
                Goal(label="kanthorq", metric="transactions", value=3),
            ),
        ),
    ),
    Drain(
        comparison=Comparison(
            name="snapshot",
            title="Drain while another session holds a snapshot; flatness is last ÷ first tenth",
            metrics=(FLATNESS, RATE),
            reference="pgqueuer",
            goals=(Goal(label="kanthorq", metric="flatness", value=0.9),),
        ),
        holds_snapshot=True,
        seconds_times=2,
    ),
    Drain(
        comparison=Comparison(
            name="past",
            title="Drain beside 1,000,000 finished tasks",
            metrics=(RATE,),
            reference="no past",
            goals=(Goal(label="1,000,000 finished", metric="rate", ratio=0.9),),
        ),
    ),
    Drain(
        comparison=Comparison(
            name="quiet",
            title="Drain by a worker of many consumers, of which one has work",
            metrics=(RATE,),
            reference="1 consumer, one has work",
            is_sequence=True,
            goals=(Goal(label="50 consumers, one has work", metric="rate", ratio=0.9),),
        ),
    ),
    Asking(
        comparison=Comparison(
            name="pull",
            title="Pull of 100 new events at the end of a stream",
            metrics=(Metric(name="time", unit="ms", is_better_when_higher=False),),
            reference="10,000 events",
            is_sequence=True,
            goals=(Goal(label="5,000,000 events", metric="time", ratio=1.2),),
        ),
        fill="events",
        method="pull",
    ),
    CatchingUp(
        Comparison(
            name="rare",
            title="Events read a second by a consumer that selects 1 of 10,000",
            metrics=(RATE,),
            goals=(Goal(label="1 of 10,000 matches", metric="rate", value=200_000),),
        )
    ),
    Footprint(
        Comparison(
            name="memory",
            title="A worker's memory, its growth, and its start-up",
            metrics=SIZES,
            goals=(
                Goal(label="kanthorq", metric="memory", value=80),
                Goal(label="kanthorq", metric="growth", value=5),
                Goal(label="kanthorq", metric="start", value=1),
            ),
        )
    ),
    Drain(
        comparison=Comparison(
            name="workers",
            title="Drain by 1 to 8 worker processes",
            metrics=(RATE,),
            reference="1 process",
            is_sequence=True,
        ),
    ),
    Drain(
        comparison=Comparison(
            name="queued",
            title="Drain of short and long queues",
            metrics=DURATIONS,
            reference="100,000 queued",
            is_sequence=True,
        ),
    ),
    Drain(
        comparison=Comparison(
            name="body", title="Drain of small and large bodies", metrics=(RATE,)
        ),
    ),
    Drain(
        comparison=Comparison(
            name="serialize",
            title="Drain of tasks that wait for their key's turn",
            metrics=(RATE,),
            reference="not serialized",
            is_sequence=True,
        ),
    ),
    Cancelling(
        Comparison(
            name="cancelled",
            title="From a request to cancel to message.cancelled in the handler",
            metrics=(*DELAYS, LONGEST),
            goals=(Goal(label="kanthorq", metric="max", value=100),),
        )
    ),
)
WORKS = (*DEFAULT, *LONG)
