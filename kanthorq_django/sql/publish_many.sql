-- Insert many events without idempotency keys: copying.py makes the rows that are sent.
COPY kanthorq_django_event (
    id, stream_id, subject, body, metadata, resource_key, schedule_at, created_at
) FROM STDIN (FORMAT binary)
