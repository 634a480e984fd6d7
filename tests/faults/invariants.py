"""What must be true after any fault, as sets over what clients saw and what the tables hold.

Pure: it knows neither Django nor PostgreSQL, and shares no code with what is on trial.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from tests.faults.facts import (
    CANCELLED,
    COMMITTED,
    COMPLETED,
    FINAL,
    IN_DOUBT,
    LOST,
    ROLLED_BACK,
    Facts,
    Handling,
    Publication,
    TaskRow,
)

ERRORS_KEPT = 20  # of one task; older ones are forgotten


class Violation(NamedTuple):
    """Something that must not be: which invariant it breaks, and how."""

    invariant: str
    what: str


def judge(facts: Facts) -> list[Violation]:
    """Return everything that is wrong; an empty list if nothing is."""
    return [
        Violation(invariant, what)
        for invariant, find in INVARIANTS.items()
        for what in sorted(find(facts))
    ]


def unkept_publications(facts: Facts) -> Iterator[str]:
    """I8: a publisher sees a commit or an exception, and there is all of it or nothing."""
    noted = Counter(effect.event for effect in facts.effects if effect.kind == "published")
    for publication in facts.publications:
        stored = publication.events & facts.ids
        if stored not in (frozenset(), publication.events):
            yield f"half of a transaction is there: {_some(stored)}"
        if publication.outcome == ROLLED_BACK and stored:
            yield f"rolled back, but there: {_some(stored)}"
        for event in publication.events:
            if noted[event] != (event in facts.ids):
                yield f"event {event} with {noted[event]} business rows beside it"


def lost_events(facts: Facts) -> Iterator[str]:
    """I1: every committed event has exactly one task of each consumer that selects it."""
    if facts.is_durable:
        committed = _events_of(facts.publications, COMMITTED)
        yield from (f"lost after its commit: event {event}" for event in committed - facts.ids)
    owed = {
        (consumer, event.id)
        for consumer, contract in facts.contracts.items()
        for event in facts.events
        if event.subject.split(".")[0] == contract.subject
    }
    made = Counter((task.consumer, task.event) for task in facts.tasks)
    yield from (f"never delivered to {who}: event {event}" for who, event in owed - made.keys())
    yield from (f"{made[pair]} tasks of {pair}" for pair in made if made[pair] > 1)


def phantom_tasks(facts: Facts) -> Iterator[str]:
    """I2: no task without its event, no event that nobody published."""
    known = _events_of(facts.publications, COMMITTED, ROLLED_BACK, IN_DOUBT, None)
    for task in facts.tasks:
        if task.event not in facts.ids:
            yield f"task {task.id} has no event {task.event}"
    for event in facts.events:
        if event.id not in known and not event.schedule:
            yield f"nobody published event {event.id}"


def inexact_effects(facts: Facts) -> Iterator[str]:
    """I3: what commits with an acknowledgement is there exactly once for each, and not without."""
    written: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for effect in facts.effects:
        written[effect.kind, effect.consumer, effect.event].append(effect.epoch)
    for task in facts.tasks:
        contract = facts.contracts[task.consumer]
        if contract.is_exact:
            done = written["done", task.consumer, task.event]
            undone = written["undone", task.consumer, task.event]
            if not _is_exact(task, done, undone, has_to_undo=contract.has_cancel_handler):
                yield f"{_told(task)}: done under the leases {done}, undone under {undone}"


def _is_exact(
    task: TaskRow, done: Sequence[int], undone: Sequence[int], *, has_to_undo: bool
) -> bool:
    """Tell whether the leases of effects are those that the task's end allows."""
    expected = [task.epoch] if task.state == COMPLETED else []
    was_undone = task.epoch in undone or not (has_to_undo and task.state == CANCELLED)
    return done == expected and was_undone and len(set(undone)) == len(undone)


def unkept_verdicts(facts: Facts) -> Iterator[str]:
    """I3: what a handler saw committed is there, and what it saw refused is not."""
    epochs = {(e.consumer, e.event, e.epoch) for e in facts.effects if e.kind != "published"}
    # What a crash took back, another handler may have done again, under a lease of that name.
    for call in facts.handlings if facts.is_durable else ():
        if not facts.contracts[call.consumer].is_exact:
            continue
        is_there = (call.consumer, call.event, call.epoch) in epochs
        if COMMITTED in call.outcomes and not is_there:
            yield f"lost after its commit: {_told_call(call)}"
        if LOST in call.outcomes and is_there:
            yield f"committed without a lease: {_told_call(call)}"


def stuck_tasks(facts: Facts) -> Iterator[str]:
    """I4: with a worker alive, nothing stays unfinished."""
    yield from (f"{_told(task)} is not final" for task in facts.tasks if task.state not in FINAL)


def shared_leases(facts: Facts) -> Iterator[str]:
    """I5: a lease has one holder, and only one holder of a task ends it."""
    if not facts.is_durable:
        return  # a lease that was lost with its commit is given out again
    holders: dict[tuple[int, int], set[str]] = defaultdict(set)
    for call in facts.handlings:
        holders[call.task, call.epoch].add(call.who)
    for (task, epoch), who in holders.items():
        if len(who) > 1:
            yield f"lease {epoch} of task {task} was held by {sorted(who)}"
    ended = Counter(
        call.task
        for call in facts.handlings
        if call.verb == "handle" and COMMITTED in call.outcomes
    )
    yield from (f"task {task} was ended {n} times" for task, n in ended.items() if n > 1)


def lost_leases(facts: Facts) -> Iterator[str]:
    """I5: a lease does not run out under a worker that lives and to which nothing was done."""
    for task in facts.tasks if facts.is_undisturbed else ():
        if task.lost_leases:
            yield f"{_told(task)} lost its lease"


def leftovers(facts: Facts) -> Iterator[str]:
    """I6: no process, no connection and no lock outlives its owner."""
    yield from facts.leftovers


def untold_failures(facts: Facts) -> Iterator[str]:
    """I7: every attempt that did not complete a task left its reason with it."""
    for task in facts.tasks:
        failed = task.attempts - (task.state == COMPLETED)
        if task.state in FINAL and failed < ERRORS_KEPT and task.failures != failed:
            yield f"{_told(task)}: {task.attempts} attempts, {task.failures} failures told"


def unkept_operations(facts: Facts) -> Iterator[str]:
    """I8: what an operator was told to be cancelled does not complete, unless it is resumed.

    Or unless the server has lost what it had told.
    """
    if not facts.is_durable:
        return
    resumed = {
        (operation.consumer, event)
        for operation in facts.operations
        if operation.verb == "resume"
        for event in operation.updated
    }
    in_doubt = any(o.verb == "resume" and o.outcome != COMMITTED for o in facts.operations)
    completed = {(task.consumer, task.event) for task in facts.tasks if task.state == COMPLETED}
    for operation in facts.operations:
        if operation.verb == "cancel" and operation.outcome == COMMITTED and not in_doubt:
            told = {(operation.consumer, event) for event in operation.updated}
            yield from (f"cancelled, but completed: {pair}" for pair in told & completed - resumed)


def disorder(facts: Facts) -> Iterator[str]:
    """I9: strictly serialized tasks of a key take effect one after the other, in their order."""
    keyed = (task for task in facts.tasks if task.key)
    number = {(task.consumer, task.event): (task.key, task.id) for task in keyed}
    lanes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for effect in facts.effects:
        contract = facts.contracts.get(effect.consumer)
        if contract and contract.is_strict and (effect.consumer, effect.event) in number:
            key, task = number[effect.consumer, effect.event]
            lanes[effect.consumer, key].append(task)
    for lane, tasks in lanes.items():
        if any(first > second for first, second in pairwise(tasks)):
            yield f"{lane} took effect in the order {tasks}"


def repeated_occurrences(facts: Facts) -> Iterator[str]:
    """I10: a schedule publishes each of its occurrences once."""
    times = Counter((e.schedule, e.occurrence) for e in facts.events if e.schedule)
    yield from (f"{n} events of {pair}" for pair, n in times.items() if n > 1)


INVARIANTS: Mapping[str, Callable[[Facts], Iterable[str]]] = {
    "I1 delivered once": lost_events,
    "I2 no phantoms": phantom_tasks,
    "I3 exactly-once effects": inexact_effects,
    "I3 verdicts last": unkept_verdicts,
    "I4 nothing is stuck": stuck_tasks,
    "I5 one holder": shared_leases,
    "I5 leases are kept": lost_leases,
    "I6 nothing is left": leftovers,
    "I7 failures are told": untold_failures,
    "I8 commit or exception": unkept_publications,
    "I8 operators are told": unkept_operations,
    "I9 strict order": disorder,
    "I10 occurrences once": repeated_occurrences,
}


def _events_of(publications: Iterable[Publication], *outcomes: str | None) -> set[str]:
    return {
        event
        for publication in publications
        if publication.outcome in outcomes
        for event in publication.events
    }


def _some(events: Iterable[str]) -> str:
    return ", ".join(sorted(events)[:3])


def _told(task: TaskRow) -> str:
    return f"task {task.id} of {task.consumer} (state {task.state}, epoch {task.epoch})"


def _told_call(call: Handling) -> str:
    return f"lease {call.epoch} of task {call.task} of {call.consumer}, {call.verb} by {call.who}"
