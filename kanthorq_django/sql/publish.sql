-- Insert one event that has no idempotency key, under an id of ours; publish_once.sql inserts others.
-- Without ON CONFLICT: that alone would have each row written speculatively, and confirmed. No row
-- comes back on the first use of a stream, which has to be registered then.
INSERT INTO kanthorq_django_event (
    id, stream_id, subject, body, metadata, resource_key, schedule_at
)
SELECT
    %(id)s, stream.id, %(subject)s, %(body)s, %(metadata)s::text::jsonb, %(resource_key)s,
    %(schedule_at)s::timestamptz
FROM kanthorq_django_stream AS stream
WHERE stream.name = %(stream)s
RETURNING stream_id, xid::text::bigint, (extract(epoch FROM created_at) * 1000000)::bigint;
