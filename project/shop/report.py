"""The table at the end: what there was, where it went, and whether it adds up."""

from collections import Counter

from kanthorq_django.models import Event, TaskState
from kanthorq_django.models.delivery.claim import LEASE_RAN_OUT
from kanthorq_django.models.task import TaskQuerySet
from project.shop import backlog
from project.shop.invariants import Audit
from project.shop.models import Sale
from project.shop.narrator import Narrator
from project.shop.story import Pace

COLUMNS = {
    "completed": TaskState.COMPLETED,
    "later": TaskState.AVAILABLE,
    "parked": TaskState.PENDING,
    "cancelled": TaskState.CANCELLED,
    "discarded": TaskState.DISCARDED,
}
NEXT = {
    "make admin": "the same data in Django's admin, with workers behind it",
    "{manage} runworker": "one more worker: try Ctrl-C, kill -9, kill -STOP",
    "{manage} kanthorq schedules show till-report": "when the till reports next",
    "{manage} kanthorq stats": "how far each consumer is behind",
    "{manage} kanthorq tasks list --state discarded": "what was given up, and why: tasks show",
    "{manage} kanthorq tasks release --consumer reviews": "what was parked may run now",
}


def print_report(narrator: Narrator, sale: Sale, audit: Audit, pace: Pace) -> None:
    """Write what ``sale`` led to, and what the audit says about it."""
    events = Event.objects.filter(metadata__sale=sale.pk)
    tasks = backlog.tasks_of(sale)
    narrator.heading("What there was")
    narrator.number("orders", sale.placed_count, f"{sale.declined_count:,} more were rolled back")
    narrator.number("events", events.count(), "published in the transactions of the orders")
    narrator.number("reports", sale.reports.count(), "of the till, at its schedule's time")
    narrator.number("tasks", tasks.count(), f"at {pace.tasks / pace.seconds:,.0f} a second")
    _print_tasks(narrator, tasks)
    _print_money(narrator, audit)
    _print_checks(narrator, tasks, audit)


def print_next_steps(narrator: Narrator, manage: str) -> None:
    """Write commands to type; ``manage`` is how to call manage.py."""
    narrator.heading("What to try next")
    for command, purpose in NEXT.items():
        narrator.line(f"  {command.format(manage=manage)}")
        narrator.line(f"      {purpose}")


def _print_tasks(narrator: Narrator, tasks: TaskQuerySet) -> None:
    counts = Counter(tasks.values_list("consumer__name", "state"))
    narrator.heading("Tasks by state", *COLUMNS)
    for consumer in sorted({name for name, _ in counts}):
        narrator.row(consumer, *(counts[consumer, state] for state in COLUMNS.values()))
    narrator.line("  later: the courier comes tomorrow    parked: until a person releases them")
    narrator.line("  cancelled: parcels, unpacked again   discarded: mistyped addresses")


def _print_money(narrator: Narrator, audit: Audit) -> None:
    narrator.heading("Money in euros", "moved", "booked")
    sums = {"payments": audit.payments, "refunds": audit.refunds}
    for name, money in sums.items():
        verdict = "equal" if money.moved == money.booked else "NOT EQUAL"
        narrator.row(name, f"{money.moved:,.2f}", f"{money.booked:,.2f}", verdict)


def _print_checks(narrator: Narrator, tasks: TaskQuerySet, audit: Audit) -> None:
    taken_over = tasks.filter(attempted_errors__contains=[{"error": LEASE_RAN_OUT}]).count()
    retried = tasks.completed().exclude(attempted_errors=[]).count() - taken_over
    narrator.heading("What is proved")
    narrator.number("lost", sum(audit.lost.values()), _name_faults(audit.lost))
    narrator.number("duplicates", sum(audit.doubled.values()), _name_faults(audit.doubled))
    narrator.number("phantoms", audit.phantom_count, "outlived a rollback, or were never due")
    narrator.number("taken over", taken_over, "tasks that the killed worker had begun")
    narrator.number("retried", retried, "tasks that failed at first: a busy mail server")


def _name_faults(faults: dict[str, int]) -> str:
    named = [f"{count} {name}" for name, count in faults.items() if count]
    return ", ".join(named) or f"of {', '.join(faults)}"
