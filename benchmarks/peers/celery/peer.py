"""Celery on Redis, one process with ten threads; it acknowledges a job before it runs."""

from benchmarks.peers.peer import Peer

PEER = Peer(
    name="celery+redis",
    package="celery",
    worker=(
        "-m",
        "celery",
        "--app=benchmarks.peers.celery.tasks",
        "worker",
        "--pool=threads",
        "--concurrency=10",
        "--loglevel=WARNING",
    ),
    broker="redis",
    jobs_per_second=1_000,
    inserts_per_second=700,
)
