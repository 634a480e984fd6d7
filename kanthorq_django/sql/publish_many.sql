COPY kanthorq_django_event (
    id, stream_id, subject, body, metadata, resource_key, schedule_at, created_at
) FROM STDIN (FORMAT binary)
