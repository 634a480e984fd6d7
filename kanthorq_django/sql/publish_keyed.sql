-- Insert many events that have idempotency keys, in the order of their keys: two publishers
-- of the same keys then wait for each other and never deadlock. Returns what was new.
INSERT INTO kanthorq_django_event (
    id, stream_id, subject, body, metadata, resource_key, idempotency_key, schedule_at
)
SELECT id, %(stream_id)s, subject, body, metadata, resource_key, idempotency_key, schedule_at
FROM unnest(
    %(ids)s::uuid[], %(subjects)s::text[], %(bodies)s::bytea[], %(metadatas)s::jsonb[],
    %(resource_keys)s::text[], %(idempotency_keys)s::text[], %(schedule_ats)s::timestamptz[]
) AS given (id, subject, body, metadata, resource_key, idempotency_key, schedule_at)
ORDER BY idempotency_key
ON CONFLICT (stream_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id;
