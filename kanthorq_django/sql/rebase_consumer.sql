-- Add the tasks that a consumer owes and does not have. Of what was restored, it owes what its
-- cursor had not read, by the transaction ids that both brought along; of what was published
-- here meanwhile it owes everything. A consumer that was registered here has a cursor that is
-- right about native events; restored ones it owes only if it starts at the beginning.
WITH consumer AS (
    SELECT
        *,
        cluster_id <> (pg_control_system()).system_identifier AS is_foreign,
        "cursor"::text = '1:1:' AS is_at_beginning
    FROM kanthorq_django_consumer
    WHERE id = %(consumer_id)s
),
clock AS (
    SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1 AS last_xid
),
owed AS MATERIALIZED (
    SELECT event.id, event.resource_key, event.schedule_at
    FROM consumer
    JOIN kanthorq_django_event AS event ON event.stream_id = consumer.stream_id,
        LATERAL (
            SELECT
                NOT pg_visible_in_snapshot(event.xid, consumer."cursor")
                    AND NOT coalesce(
                        pg_visible_in_snapshot(event.xid, consumer."window")
                            AND (event.xid, event.id) <= (consumer.position_xid, consumer.position_id),
                        false
                    ) AS is_unread,
                least(
                    event.xid::text::bigint,
                    last_xid - ((last_xid - event.xmin::text::bigint) & 4294967295)
                ) > %(boundary)s::bigint AS is_native
            FROM clock
        ) AS seen
    WHERE event.subject ~ %(includes)s
        AND event.subject !~ %(excludes)s
        AND (consumer.deliver_from IS NULL OR event.created_at >= consumer.deliver_from)
        AND CASE WHEN is_foreign THEN is_unread OR coalesce(is_native, false)
            ELSE is_unread AND (is_at_beginning OR coalesce(is_native, true)) END
),
added AS (
    INSERT INTO kanthorq_django_task (
        consumer_id, event_id, resource_key, turn_key, state, schedule_at
    )
    SELECT
        consumer.id, owed.id, owed.resource_key,
        CASE WHEN consumer.serialize <> '' AND owed.resource_key <> '' THEN owed.resource_key END,
        CASE WHEN consumer.parked THEN 0 ELSE 1 END,
        coalesce(owed.schedule_at, statement_timestamp())
    FROM owed, consumer
    ORDER BY owed.id
    ON CONFLICT (consumer_id, event_id) DO NOTHING
    RETURNING id
)
SELECT
    (SELECT count(*) FROM owed) AS event_count,
    (SELECT count(*) FROM added) AS task_count;
