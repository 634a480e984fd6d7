"""Large tables, filled by PostgreSQL itself in many transactions, as publishers would."""

from django.db import connection

from kanthorq_django.models import Consumer, Stream
from kanthorq_django.models.registration import Registration

PER_TRANSACTION = 1_000
RARE_EVERY = 10_000

# Ids that sort by insertion, as those of publishers do.
EVENTS = """
    DO $$ BEGIN FOR i IN 0..{transactions} - 1 LOOP
        INSERT INTO kanthorq_django_event
            (id, stream_id, subject, body, metadata, resource_key)
        SELECT
            lpad(to_hex(i * {size}::bigint + n), 32, '0')::uuid,
            {stream},
            CASE WHEN (i * {size}::bigint + n) % {rare_every} = 0 THEN 'rare' ELSE 'common' END,
            convert_to(((i * {size}::bigint + n) / {rare_every} - 1)::text, 'UTF8'),
            '{{}}',
            ''
        FROM generate_series(1, {size}) AS n;
        COMMIT;
    END LOOP; END $$
"""
FINISHED = """
    INSERT INTO kanthorq_django_task
        (consumer_id, event_id, state, schedule_at, lease_epoch, attempt_count, finalized_at)
    SELECT {consumer}, id, 101, statement_timestamp(), 1, 1, statement_timestamp()
    FROM kanthorq_django_event WHERE stream_id = {stream}
"""


def add_events(stream: str, count: int) -> Stream:
    """Insert ``count`` events, of which every 10,000th has the subject ``rare``."""
    row, _ = Stream.objects.get_or_create(name=stream)
    _execute(
        EVENTS.format(
            transactions=count // PER_TRANSACTION,
            size=PER_TRANSACTION,
            stream=row.pk,
            rare_every=RARE_EVERY,
        )
    )
    _execute("VACUUM ANALYZE kanthorq_django_event")
    return row


def add_finished_tasks(name: str, count: int) -> None:
    """Let the consumer ``name`` have read and completed ``count`` events of its stream."""
    stream = add_events(name, count)
    consumer = Consumer.objects.register(name, Registration(name, [">"], deliver="new"))
    _execute(FINISHED.format(consumer=consumer.pk, stream=stream.pk))
    _execute("VACUUM ANALYZE kanthorq_django_task")


def _execute(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)
