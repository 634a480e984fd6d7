-- Where the transaction ids of this cluster take over from those of the cluster that was
-- restored here: what was inserted up to the boundary is restored, what came later is native.
-- Null when the count of transaction ids just went on, as after pg_upgrade.
--
-- The system column xmin tells which transaction inserted a row, or updated it: reencrypt alone
-- does, each row in a savepoint of its own. So a native row was written by the very transaction of
-- its xid, or by one with a higher number; and everything with one xmin then has one xid. Rows that
-- contradict this were restored, and so was whatever was inserted before them.
WITH clock AS (
    SELECT
        pg_snapshot_xmax(pg_current_snapshot()) AS next_xid,
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1 AS last_xid
),
stranger AS MATERIALIZED (
    SELECT id, "cursor"
    FROM kanthorq_django_consumer
    WHERE cluster_id <> (pg_control_system()).system_identifier
),
insertion AS (
    SELECT
        inserted_by,
        max(published_by) > inserted_by OR min(published_by) < max(published_by) AS is_impossible,
        -- Pulls refuse a foreign consumer, so its tasks are as old as its cursor.
        bool_or(EXISTS (
            SELECT FROM kanthorq_django_task AS task
            JOIN stranger ON stranger.id = task.consumer_id
            WHERE task.event_id = event.id
        )) AS has_old_task
    FROM kanthorq_django_event AS event, clock,
        LATERAL (
            SELECT
                event.xid::text::bigint AS published_by,
                -- xmin has 32 bits only: the newest transaction whose number ends in them.
                last_xid - ((last_xid - event.xmin::text::bigint) & 4294967295) AS inserted_by
        ) AS origin
    GROUP BY inserted_by
)
SELECT CASE
    WHEN bool_or(is_impossible)
        OR EXISTS (SELECT FROM stranger, clock WHERE pg_snapshot_xmax("cursor") > next_xid)
    THEN coalesce(max(inserted_by) FILTER (WHERE is_impossible OR has_old_task), 0)
END AS boundary
FROM insertion;
