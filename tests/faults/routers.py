"""A router as projects with a replica have it: reads go there, writes to the primary."""

from typing import Any

REPLICA = "replica"
OWN = {"kanthorq_django", "ledger"}


class ReadsFromReplica:
    """Sends every read of these apps to ``replica``, and keeps everything else where it is."""

    replica, primary = REPLICA, "default"

    def db_for_read(self, model: Any, **_: Any) -> str | None:
        return self.replica if model._meta.app_label in OWN else None

    def db_for_write(self, model: Any, **_: Any) -> str | None:
        return self.primary if model._meta.app_label in OWN else None

    def allow_relation(self, *_: Any, **__: Any) -> bool:
        return True


class ReadsFromOther(ReadsFromReplica):
    """The same between the two databases that tests of the project have."""

    replica = "other"
