-- Insert many events that have idempotency keys, in the order given: sorted by key, so that two
-- publishers of the same keys wait for each other and never deadlock. Returns what was new.
INSERT INTO kanthorq_django_event (
    id, stream_id, subject, body, metadata, resource_key, idempotency_key, schedule_at, created_at
)
SELECT
    id, %(stream_id)s, subject, decode(body, 'hex'), metadata, resource_key, idempotency_key,
    nullif(schedule_at, '')::timestamptz,  -- as in ack.sql
    'epoch'::timestamptz + %(microseconds)s::bigint * interval '1 microsecond'
FROM unnest(
    %(id)s::uuid[], %(subject)s::text[], %(body)s::text[], %(metadata)s::jsonb[],
    %(resource_key)s::text[], %(idempotency_key)s::text[], %(schedule_at)s::text[]
) WITH ORDINALITY
    AS given (id, subject, body, metadata, resource_key, idempotency_key, schedule_at, position)
ORDER BY given.position
ON CONFLICT (stream_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id;
