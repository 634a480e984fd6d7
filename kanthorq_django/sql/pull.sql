-- Turn a page of new events of one stream into tasks, and advance the cursor past them. An
-- event is new exactly when its transaction was not visible in the consumer's cursor and is
-- visible in the window that is being read. It counts events read, not matched, so a consumer
-- that selects one event in a million advances too; and it stops at the match that fills the
-- room of the puller, so nothing is leased that cannot be started, and before the match whose body
-- would be too much beside the others', so nothing is leased that its memory cannot hold.
WITH reader AS MATERIALIZED (
    -- As lock_consumer.sql left it. Without its lock, or with filters that were changed since
    -- the caller knew them, nothing is read at all: everything below is NULL or empty then.
    SELECT
        consumer.*,
        -- The open window, or a new one up to now. A snapshot leaves out the caller's own
        -- transaction, which then looks finished as soon as any later one is: add it back.
        coalesce(
            "window",
            CASE WHEN pg_visible_in_snapshot(pg_current_xact_id(), latest) THEN
                format(
                    '%%s:%%s:%%s', pg_snapshot_xmin(latest), pg_snapshot_xmax(latest),
                    (SELECT string_agg(xid::text, ',' ORDER BY xid)
                     FROM (SELECT pg_snapshot_xip(latest) UNION SELECT pg_current_xact_id()) AS open (xid))
                )::pg_snapshot
            ELSE latest END
        ) AS horizon,
        -- Where fresh events begin: behind the cursor, or where the last page ended.
        greatest(position_xid, pg_snapshot_xmax("cursor")) AS fresh_xid,
        CASE WHEN position_xid >= pg_snapshot_xmax("cursor") THEN position_id
            ELSE '00000000-0000-0000-0000-000000000000' END AS fresh_id
    FROM kanthorq_django_consumer AS consumer, pg_current_snapshot() AS latest
    WHERE id = %(consumer_id)s
        AND current_setting('kanthorq.locked', true) = id::text
        AND subject_includes = %(subject_includes)s::jsonb
        AND subject_excludes = %(subject_excludes)s::jsonb
),
page AS MATERIALIZED (
    -- Late: transactions that were open in the cursor. One index probe each, however
    -- many rows others wrote meanwhile; LATERAL, because = ANY would sort every page. A range
    -- of one xid: for xid = open.xid the planner would take the order of the primary key and read all
    -- of the table, where its statistics know events of one transaction alone.
    (
        SELECT late.*
        FROM reader,
            pg_snapshot_xip(reader."cursor") AS open (xid),
            LATERAL (
                SELECT
                    xid, id, subject, schedule_at, resource_key, created_at,
                    octet_length(body) AS body_size
                FROM kanthorq_django_event
                WHERE stream_id = reader.stream_id
                    AND xid >= open.xid AND xid <= open.xid
                    AND id > CASE WHEN open.xid = reader.position_xid THEN reader.position_id
                        ELSE '00000000-0000-0000-0000-000000000000' END
                ORDER BY xid, id
                LIMIT %(page_size)s
            ) AS late
        WHERE pg_visible_in_snapshot(open.xid, reader.horizon)
            AND open.xid >= coalesce(reader.position_xid, '0')
        ORDER BY late.xid, late.id
        LIMIT %(page_size)s
    )
    UNION ALL
    -- Fresh: transactions that began after the cursor. One folded row comparison: with two
    -- conditions the index scan would start at the smaller and wade through all between. Scalar
    -- subqueries in the place of a join, so that the rows come in the order of the index, and the scan
    -- ends as soon as the page is full: behind that, much may be invisible yet.
    (
        SELECT
            xid, id, subject, schedule_at, resource_key, created_at,
            octet_length(body) AS body_size  -- without reading a long one, which tells its length
        FROM kanthorq_django_event
        WHERE stream_id = (SELECT stream_id FROM reader)
            AND (xid, id) > ((SELECT fresh_xid FROM reader), (SELECT fresh_id FROM reader))
            AND xid < (SELECT pg_snapshot_xmax(horizon) FROM reader)
            AND pg_visible_in_snapshot(xid, (SELECT horizon FROM reader))
        ORDER BY xid, id
        LIMIT %(page_size)s
    )
    ORDER BY xid, id
    LIMIT %(page_size)s
),
matching AS MATERIALIZED (
    -- A first body always fits. Behind one that does not, none does: the sum only grows.
    SELECT
        *,
        sum(body_size) OVER (ORDER BY xid, id ROWS UNBOUNDED PRECEDING)
            <= greatest(%(size_max)s::bigint, body_size) AS fits
    FROM (
        SELECT page.*
        FROM page, reader
        WHERE page.subject ~ %(includes)s
            AND page.subject !~ %(excludes)s
            AND (reader.deliver_from IS NULL OR page.created_at >= reader.deliver_from)
        ORDER BY page.xid, page.id
        LIMIT %(limit)s
    ) AS room
),
pulled AS (
    INSERT INTO kanthorq_django_task (
        consumer_id, event_id, resource_key, turn_key, state, schedule_at,
        attempt_count, lease_epoch, attempted_at
    )
    SELECT
        reader.id, matching.id, matching.resource_key, turn.key,
        CASE WHEN reader.parked THEN 0 WHEN leased THEN 2 ELSE 1 END,
        CASE WHEN leased THEN statement_timestamp() + %(visibility_timeout)s::interval
            ELSE coalesce(matching.schedule_at, statement_timestamp()) END,
        leased::int, leased::int, CASE WHEN leased THEN statement_timestamp() END
    FROM matching, reader,
        -- What is serialized by key waits for its turn, which only a claim can tell.
        LATERAL (SELECT CASE WHEN reader.serialize <> '' AND matching.resource_key <> ''
            THEN matching.resource_key END) AS turn (key),
        LATERAL (SELECT NOT reader.parked AND turn.key IS NULL
            AND coalesce(matching.schedule_at <= statement_timestamp(), true)) AS due (leased)
    WHERE matching.fits
    ORDER BY matching.xid, matching.id
    -- Never met while the cursor is right; the second line of defence.
    ON CONFLICT (consumer_id, event_id) DO NOTHING
    RETURNING *
),
progress AS MATERIALIZED (
    -- A full room stops at its last match that fits; what follows it is read again by the next pull.
    SELECT
        reader.*,
        matched.is_full,
        matched.body_size,
        CASE WHEN is_full THEN matched.fit_count ELSE (SELECT count(*) FROM page) END AS read_count
    FROM reader, (
        SELECT
            count(*) = %(limit)s OR count(*) > count(*) FILTER (WHERE fits) AS is_full,
            count(*) FILTER (WHERE fits) AS fit_count,
            avg(body_size) FILTER (WHERE fits) AS body_size
        FROM matching
    ) AS matched
),
advanced AS (
    UPDATE kanthorq_django_consumer AS consumer
    SET
        "cursor" = CASE WHEN has_more THEN consumer."cursor" ELSE progress.horizon END,
        "window" = CASE WHEN has_more THEN progress.horizon END,
        (position_xid, position_id) = (
            SELECT xid, id FROM (
                SELECT xid, id FROM matching WHERE progress.is_full AND fits
                UNION ALL
                SELECT xid, id FROM page WHERE NOT progress.is_full
            ) AS read
            WHERE has_more
            ORDER BY xid DESC, id DESC
            LIMIT 1
        )
    FROM progress, LATERAL (SELECT is_full OR read_count = %(page_size)s) AS more (has_more)
    WHERE consumer.id = %(consumer_id)s
        -- An idle look writes nothing; an empty page that closes a window does.
        AND (progress.read_count > 0 OR progress."window" IS NOT NULL)
)
SELECT
    progress.id IS NOT NULL AS is_read,
    -- Nothing was read and no window was open: the consumer has caught up.
    progress.read_count = 0 AND progress."window" IS NULL AS is_idle,
    progress.is_full,
    progress.body_size::bigint AS body_size,
    -- Fails if the cursor, or an event, is ahead of this cluster, and so came from another one; or if a
    -- transaction is open that the cursor saw ended: see mend_cursor.sql. A cast that fails is how
    -- plain SQL raises an error, before the COMMIT that is sent along.
    CASE WHEN progress.id IS NULL OR (
        pg_snapshot_xmax(progress."cursor") <= pg_snapshot_xmax(pg_current_snapshot())
        AND greatest(pg_snapshot_xmin(progress."cursor"), pg_snapshot_xmin(progress."window"))
            <= pg_snapshot_xmin(pg_current_snapshot())
        AND (
            -- Read once; it passes over all that open transactions have published. With
            -- progress.stream_id it would do so for each task. The order keeps the planner on the index.
            SELECT id FROM kanthorq_django_event
            WHERE stream_id = (SELECT stream_id FROM reader)
                AND xid >= pg_snapshot_xmax(pg_current_snapshot())
                AND xid <> pg_current_xact_id()
            ORDER BY xid, id
            LIMIT 1
        ) IS NULL
    ) THEN true ELSE ('another cluster, beyond ' || pg_current_snapshot()::text)::boolean END
        AS is_sane,
    -- Named: the server keeps the statement, and its columns may not change meanwhile. Without those
    -- that are the same in each task which is leased here, see Task.from_row(): to send them took a
    -- twentieth of what a worker does for a task. Moments as microseconds since 1970: Python takes
    -- twenty times as long to read them as text. Those that we do not set ourselves may be any that SQL
    -- can write: those that Python cannot hold, and infinity, are told as the nearest that it can, in
    -- every time zone. (CASE: greatest() would pass over NULL.)
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
FROM (
    SELECT '0002-01-01 00:00Z'::timestamptz, '9998-12-31 23:59:59.999999Z'::timestamptz
) AS readable (first, last)
LEFT JOIN progress ON true
LEFT JOIN pulled ON pulled.state = 2
-- One by one, and in the order of the primary key: a plan that the server made while there was hardly
-- any event, and keeps, would go through all of them for each, in the table or in another index.
LEFT JOIN LATERAL (
    SELECT * FROM kanthorq_django_event
    WHERE id >= pulled.event_id AND id <= pulled.event_id
    ORDER BY id
    LIMIT 1
) AS event ON true
ORDER BY pulled.id;
