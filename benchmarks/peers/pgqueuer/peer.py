"""pgqueuer, with the batch size that its users raise first: 100 instead of 10."""

from benchmarks.peers.peer import FAST_WORKS, Peer

PEER = Peer(
    name="pgqueuer",
    package="pgqueuer",
    worker=(
        "-m",
        "pgqueuer",
        "run",
        "benchmarks.peers.pgqueuer.worker:create",
        "--batch-size",
        "100",
        "--log-level",
        "WARNING",
    ),
    settled="SELECT NOT EXISTS (SELECT FROM pgqueuer WHERE entrypoint <> 'warm')",
    jobs_per_second=17_000,
    inserts_per_second=2_500,
    works=FAST_WORKS,
)
