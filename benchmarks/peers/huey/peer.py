"""huey on PostgreSQL, which deletes a job before it runs: a dead worker loses it."""

from benchmarks.peers.peer import Peer

PEER = Peer(
    name="huey",
    package="huey",
    worker=(
        "-m",
        "huey.bin.huey_consumer",
        "benchmarks.peers.huey.tasks.huey",
        "--workers=10",
        "--quiet",
    ),
    jobs_per_second=3_000,
)
