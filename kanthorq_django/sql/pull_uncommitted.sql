-- For tests only: pull inside an open transaction. Its own events never enter a snapshot, so
-- whatever has no task yet and was not read by the cursor is new; the cursor stays as it is. All of
-- it at once: what is not leased leaves no trace in the rows, and is not to look like the end.
WITH consumer AS (
    SELECT * FROM kanthorq_django_consumer WHERE id = %(consumer_id)s
),
pulled AS (
    INSERT INTO kanthorq_django_task (
        consumer_id, event_id, resource_key, turn_key, state, schedule_at,
        attempt_count, lease_epoch, attempted_at
    )
    SELECT
        consumer.id, event.id, event.resource_key, turn.key,
        CASE WHEN consumer.parked THEN 0 WHEN leased THEN 2 ELSE 1 END,
        CASE WHEN leased THEN statement_timestamp() + consumer.visibility_timeout
            ELSE coalesce(event.schedule_at, statement_timestamp()) END,
        leased::int, leased::int, CASE WHEN leased THEN statement_timestamp() END
    FROM consumer
    JOIN kanthorq_django_event AS event ON event.stream_id = consumer.stream_id,
        LATERAL (SELECT CASE WHEN consumer.serialize <> '' AND event.resource_key <> ''
            THEN event.resource_key END) AS turn (key),
        LATERAL (SELECT NOT consumer.parked AND turn.key IS NULL
            AND coalesce(event.schedule_at <= statement_timestamp(), true)) AS due (leased)
    WHERE NOT pg_visible_in_snapshot(event.xid, consumer."cursor")
        AND event.subject ~ %(includes)s
        AND event.subject !~ %(excludes)s
        AND (consumer.deliver_from IS NULL OR event.created_at >= consumer.deliver_from)
        -- What was there before a consumer that starts "new" is of the same transaction: only the
        -- clock tells. Any other one begins with an empty cursor.
        AND (consumer."cursor"::text = '1:1:' OR event.created_at >= consumer.created_at)
        AND event.id NOT IN (SELECT unnest(%(handled)s::uuid[]))
        AND NOT EXISTS (
            SELECT FROM kanthorq_django_task AS task
            WHERE task.event_id = event.id AND task.consumer_id = consumer.id
        )
    ORDER BY event.xid, event.id
    RETURNING *
)
SELECT
    -- As in pull.sql.
    pulled.id,
    pulled.event_id,
    pulled.resource_key,
    (extract(epoch FROM pulled.schedule_at) * 1000000)::bigint AS schedule_at,
    (extract(epoch FROM pulled.attempted_at) * 1000000)::bigint AS attempted_at,
    event.subject AS event_subject,
    event.body AS event_body,
    event.metadata::text AS event_metadata,
    event.idempotency_key AS event_idempotency_key,
    event.xid::text::bigint AS event_xid,
    (extract(epoch FROM CASE WHEN event.schedule_at < first THEN first
        WHEN event.schedule_at > last THEN last
        ELSE event.schedule_at END) * 1000000)::bigint AS event_schedule_at,
    (extract(epoch FROM CASE WHEN event.created_at < first THEN first
        WHEN event.created_at > last THEN last
        ELSE event.created_at END) * 1000000)::bigint AS event_created_at
FROM pulled
CROSS JOIN (
    SELECT '0002-01-01 00:00Z'::timestamptz, '9998-12-31 23:59:59.999999Z'::timestamptz
) AS readable (first, last)
JOIN kanthorq_django_event AS event ON event.id = pulled.event_id
WHERE pulled.state = 2
ORDER BY pulled.id;
