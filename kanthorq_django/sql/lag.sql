-- How many events of its stream a consumer has not read yet, whether they match or not, counted
-- up to a limit. What is unread is said in three index ranges, so that a long backlog that was
-- partly worked off is not counted from its start. Reads only.
WITH consumer AS (
    SELECT
        stream_id,
        "cursor",
        "window",
        coalesce(position_xid, '0') AS position_xid,
        coalesce(position_id, '00000000-0000-0000-0000-000000000000') AS position_id
    FROM kanthorq_django_consumer
    WHERE id = %(consumer_id)s
),
passed AS (
    -- Transactions that were open when the cursor or the window was taken, and are behind the
    -- position: all of their events, but for those that the window has delivered.
    SELECT open.xid
    FROM consumer,
        LATERAL (
            SELECT pg_snapshot_xip("cursor")
            UNION
            SELECT pg_snapshot_xip("window")
        ) AS open (xid)
    WHERE NOT pg_visible_in_snapshot(open.xid, "cursor")
        AND (open.xid < position_xid OR open.xid < pg_snapshot_xmax("cursor"))
        AND (
            "window" IS NULL
            OR NOT pg_visible_in_snapshot(open.xid, "window")
            OR open.xid >= position_xid
        )
),
unread AS (
    (
        SELECT late.created_at
        FROM consumer, passed,
            LATERAL (
                SELECT created_at
                FROM kanthorq_django_event
                WHERE stream_id = consumer.stream_id
                    AND xid = passed.xid
                    AND (passed.xid <> consumer.position_xid OR id > consumer.position_id)
                ORDER BY id
                LIMIT %(limit)s + 1
            ) AS late
        LIMIT %(limit)s + 1
    )
    UNION ALL
    (
        SELECT fresh.created_at
        FROM consumer,
            LATERAL (
                SELECT created_at
                FROM kanthorq_django_event
                WHERE stream_id = consumer.stream_id
                    AND (xid, id) > (
                        greatest(consumer.position_xid, pg_snapshot_xmax(consumer."cursor")),
                        CASE WHEN consumer.position_xid >= pg_snapshot_xmax(consumer."cursor")
                            THEN consumer.position_id
                            ELSE '00000000-0000-0000-0000-000000000000'::uuid END
                    )
                ORDER BY xid, id
                LIMIT %(limit)s + 1
            ) AS fresh
    )
)
SELECT
    least(count(*), %(limit)s) AS count,
    count(*) > %(limit)s AS is_bounded,
    -- Times that Python cannot hold as the nearest that it can, as in pull.sql.
    statement_timestamp() - min(
        least(greatest(created_at, '0002-01-01 00:00Z'), '9998-12-31 23:59:59.999999Z')
    ) AS oldest
FROM unread;
