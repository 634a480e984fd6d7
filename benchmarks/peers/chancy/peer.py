"""chancy, with the executors that fit: coroutines where nothing blocks, else ten threads."""

from benchmarks.peers.peer import BULK_WORKS, Peer

PEER = Peer(
    name="chancy",
    package="chancy",
    worker=("-m", "chancy.cli.cli", "--app", "benchmarks.peers.chancy.jobs.app", "worker", "start"),
    settled="SELECT NOT EXISTS (SELECT FROM chancy_jobs WHERE state <> 'succeeded')",
    jobs_per_second=3_000,
    works=BULK_WORKS,
)
