"""What the consumers of the workload promise; here they can be read about without subscribing."""

import os
from datetime import timedelta

from tests.faults.facts import Contract

STREAM = "faults"
LEASE = timedelta(seconds=float(os.environ.get("FAULTS_LEASE", "2")))

CONTRACTS = {
    "plain": Contract(subject="order"),
    "explicit": Contract(subject="order"),
    "coroutine": Contract(subject="order"),
    "awaiting": Contract(subject="order", is_exact=True),
    "transactional": Contract(subject="order", is_exact=True),
    "atomic": Contract(subject="order", is_exact=True),
    "batched": Contract(subject="order", is_exact=True),
    "strict": Contract(subject="order", is_exact=True, is_strict=True),
    "cancellable": Contract(subject="order", is_exact=True, has_cancel_handler=True),
    "ticks": Contract(subject="tick", is_exact=True),
    "gated": Contract(subject="gate", is_exact=True),
    "lingering": Contract(subject="linger", is_exact=True),
    "slow": Contract(subject="slow"),
    "poison": Contract(subject="poison"),
    "stormy": Contract(subject="storm"),
}
WORKLOAD = [name for name, contract in CONTRACTS.items() if contract.subject == "order"]
