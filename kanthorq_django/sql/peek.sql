-- One cheap look for all consumers of a worker: who has new events, and when is the next task
-- due? Reads only, so an idle worker writes nothing and uses up no transaction id.
WITH gap AS MATERIALIZED (
    -- The ranges of transaction ids between those that are open. Of the open ones only the oldest
    -- few count, so that a look beside hundreds of them stays short.
    SELECT xid, lead(xid, 1, pg_snapshot_xmax(pg_current_snapshot())) OVER (ORDER BY xid) AS until
    FROM (
        SELECT '0'::xid8
        UNION ALL
        (
            SELECT xid FROM pg_snapshot_xip(pg_current_snapshot()) AS open (xid)
            ORDER BY xid
            LIMIT 16
        )
    ) AS open (xid)
)
SELECT
    consumer.id,
    -- Also where a pull has to refuse or to mend, so that it is not taken for idle.
    consumer.cluster_id <> (SELECT system_identifier FROM pg_control_system())
        OR pg_snapshot_xmax(consumer."cursor") > pg_snapshot_xmax(pg_current_snapshot())
        OR pg_snapshot_xmin(consumer."cursor") > pg_snapshot_xmin(pg_current_snapshot())
        OR consumer."window" IS NOT NULL
        -- Scalar subqueries in the index's order: behind EXISTS the planner expects an early hit
        -- and reads the table from its start, which is all of it when there is none. It would do the
        -- same for xid = open.xid, where its statistics know events of one transaction alone.
        OR EXISTS (
            SELECT FROM pg_snapshot_xip(consumer."cursor") AS open (xid)
            WHERE pg_visible_in_snapshot(open.xid, pg_current_snapshot()) AND (
                SELECT event.id
                FROM kanthorq_django_event AS event
                WHERE event.stream_id = consumer.stream_id
                    AND event.xid >= open.xid AND event.xid <= open.xid
                ORDER BY event.xid, event.id
                LIMIT 1
            ) IS NOT NULL
        )
        -- Fresh events, of transactions that began after the cursor. What open ones have published is
        -- passed over: nobody sees it yet, and it may be a million of events.
        OR (
            SELECT fresh.id
            FROM gap,
            LATERAL (
                SELECT event.id
                FROM kanthorq_django_event AS event
                WHERE event.stream_id = consumer.stream_id
                    AND (event.xid, event.id) > (
                        greatest(gap.xid, pg_snapshot_xmax(consumer."cursor")),
                        CASE WHEN gap.xid < pg_snapshot_xmax(consumer."cursor")
                            THEN '00000000-0000-0000-0000-000000000000'::uuid
                            ELSE 'ffffffff-ffff-ffff-ffff-ffffffffffff' END
                    )
                    AND event.xid < gap.until
                ORDER BY event.xid, event.id
                LIMIT 1
            ) AS fresh
            WHERE gap.until > pg_snapshot_xmax(consumer."cursor")
            LIMIT 1
        ) IS NOT NULL
        -- Events that another cluster wrote, which a pull refuses: their ids are far ahead. Looked for
        -- 1,000 ids ahead, which passes over what open transactions have published: of these there are
        -- no more than connections.
        OR (
            SELECT event.id
            FROM kanthorq_django_event AS event
            WHERE event.stream_id = consumer.stream_id
                AND event.xid >= (pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 1000)::text::xid8
            ORDER BY event.xid, event.id
            LIMIT 1
        ) IS NOT NULL AS has_events,
    -- Whose turn it is only a claim can tell; that one may be due is enough to try. What SQL made due
    -- before Python's times, say at -infinity, is told as due when they begin.
    (
        SELECT (extract(epoch FROM greatest(task.schedule_at, '0002-01-01 00:00Z')) * 1000000)::bigint
        FROM kanthorq_django_task AS task
        WHERE task.consumer_id = consumer.id
            AND task.turn_key IS NOT NULL AND task.state IN (1, 2, 102)
            AND task.state = ANY(%(states)s::smallint[])
            AND task.schedule_at <= statement_timestamp() + %(horizon)s::interval
        ORDER BY task.schedule_at
        LIMIT 1
    ) AS turn_at,
    -- The first task that is due, or will be before the worker looks again. Finished tasks leave
    -- dead entries behind on both sides: where leases ended, below, and where leases of what was
    -- finished early would have ended, above. While somebody holds an old snapshot they stay, and
    -- a look that did not know its bounds would wade through all of them. A floor before
    -- 1970 is the beginning: -infinity is none, and a multiple of an interval not exact so far back.
    (
        SELECT (extract(epoch FROM greatest(task.schedule_at, '0002-01-01 00:00Z')) * 1000000)::bigint
        FROM kanthorq_django_task AS task
        WHERE task.consumer_id = consumer.id
            AND task.state IN (1, 2, 3, 102) AND (task.turn_key IS NULL OR task.state = 3)
            AND task.state = ANY(%(states)s::smallint[])
            AND task.schedule_at >= CASE WHEN asked.floor > 0
                THEN 'epoch'::timestamptz + asked.floor * interval '1 microsecond' ELSE '-infinity' END
            AND task.schedule_at <= statement_timestamp() + %(horizon)s::interval
        ORDER BY task.schedule_at, task.id
        LIMIT 1
    ) AS due_at,
    (extract(epoch FROM statement_timestamp()) * 1000000)::bigint AS looked_at
FROM unnest(%(consumer_ids)s::bigint[], %(floors)s::bigint[]) AS asked (id, floor)
JOIN kanthorq_django_consumer AS consumer USING (id);
