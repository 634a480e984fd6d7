"""dramatiq on Redis, one process with ten threads."""

from benchmarks.peers.peer import Peer

PEER = Peer(
    name="dramatiq+redis",
    package="dramatiq",
    worker=(
        "-m",
        "dramatiq",
        "benchmarks.peers.dramatiq.tasks",
        "--processes=1",
        "--threads=10",
    ),
    broker="redis",
    jobs_per_second=2_000,
    inserts_per_second=1_500,
)
