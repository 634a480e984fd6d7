"""KanthorQ, run as its users run it."""

from benchmarks.peers.peer import FAST_WORKS, Entry, Peer

PEER = Peer(
    name="kanthorq",
    package="kanthorq",
    worker=("manage.py", "runworker", "{job}", "--processes", "{processes}"),
    has_processes_option=True,
    settled="SELECT NOT EXISTS (SELECT FROM kanthorq_django_task WHERE state IN (0, 1, 2, 3, 102))",
    jobs_per_second=20_000,
    settings="benchmarks.peers.kanthorq.settings",
    works=FAST_WORKS,
    entries={
        "insert": (
            Entry("kanthorq, atomic=True", "insert_atomic", 2_500),
            Entry(
                "kanthorq, atomic=True, GROUP_COMMIT=20",
                "insert_atomic",
                5_000,
                {"BENCH_GROUP_COMMIT": "20"},
            ),
            Entry("kanthorq, batch and bulk_create", "insert_batch", 20_000),
        ),
        "crowd": (
            Entry("nobody listens, NOTIFY off", "silent", 6_000, {"BENCH_NOTIFY": "0"}),
            Entry("nobody listens", "alone", 6_000),
            Entry("4 sessions listen", "listeners", 6_000),
        ),
        "past": (Entry("no past", "0", 20_000), Entry("1,000,000 finished", "1000000", 20_000)),
        "quiet": tuple(
            Entry(
                f"{count} consumer{'s' * (count > 1)}, one has work",
                "" if count > 1 else "noop",
                20_000,
                {"BENCH_QUIET_CONSUMERS": str(count - 1)},
            )
            for count in (1, 10, 50)
        ),
        "pull": (Entry("10,000 events", "10000", 1), Entry("5,000,000 events", "5000000", 1)),
        "rare": (Entry("1 of 10,000 matches", "1000000", 1),),
        "cancelled": (Entry("kanthorq", "cancellable", 1),),
        "serialize": (
            Entry("not serialized", "noop", 20_000),
            *(
                Entry(
                    f"{keys:,} key{'s' * (keys > 1)}", "serialized", pace, {"BENCH_KEYS": str(keys)}
                )
                for keys, pace in ((1, 500), (100, 5_000), (10_000, 10_000))
            ),
        ),
        "workers": tuple(
            Entry(f"{count} process{'es' * (count > 1)}", "noop", 20_000, processes=count)
            for count in (1, 2, 4, 8)
        ),
        "queued": tuple(
            Entry(f"{count:,} queued", "noop", 20_000, count=count)
            for count in (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
        ),
        "body": tuple(
            Entry(
                f"body of {size / 1000:g} KB",
                "noop",
                pace,
                {"BENCH_BODY_SIZE": str(size)},
            )
            for size, pace in ((100, 20_000), (1_000, 20_000), (10_000, 10_000), (100_000, 1_000))
        ),
    },
)
