-- Insert one event whose idempotency key may have been used, or whose id may be taken. No row comes
-- back then, or on the first use of a stream, which has to be registered; this waits for a concurrent
-- publisher of the same to commit or roll back.
INSERT INTO kanthorq_django_event (
    id, stream_id, subject, body, metadata, resource_key, idempotency_key, schedule_at
)
SELECT
    %(id)s, stream.id, %(subject)s, %(body)s, %(metadata)s::text::jsonb, %(resource_key)s,
    %(idempotency_key)s, %(schedule_at)s::timestamptz
FROM kanthorq_django_stream AS stream
WHERE stream.name = %(stream)s
ON CONFLICT DO NOTHING
RETURNING stream_id, xid::text::bigint, (extract(epoch FROM created_at) * 1000000)::bigint;
