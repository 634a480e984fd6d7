-- Turn a page of new events of one stream into tasks, and advance the cursor past them. An
-- event is new exactly when its transaction was not visible in the consumer's cursor and is
-- visible in the window that is being read. It counts events read, not matched, so a consumer
-- that selects one event in a million advances too; and it stops at the match that fills the
-- room of the puller, so nothing is leased that cannot be started.
WITH consumer AS MATERIALIZED (
    -- As lock_consumer.sql left it. Without its lock, or with filters that were changed since
    -- the caller knew them, nothing is read at all: everything below is NULL or empty then.
    SELECT
        *,
        coalesce(position_xid, '0') AS start_xid,
        coalesce(position_id, '00000000-0000-0000-0000-000000000000') AS start_id
    FROM kanthorq_django_consumer
    WHERE id = %(consumer_id)s
        AND current_setting('kanthorq.locked', true) = id::text
        AND subject_includes = %(subject_includes)s::jsonb
        AND subject_excludes = %(subject_excludes)s::jsonb
),
horizon AS MATERIALIZED (
    -- The open window, or a new one up to now. A snapshot leaves out the caller's own
    -- transaction, which then looks finished as soon as any later one is: add it back.
    SELECT coalesce(
        (SELECT "window" FROM consumer),
        CASE WHEN pg_visible_in_snapshot(pg_current_xact_id(), latest) THEN
            format(
                '%%s:%%s:%%s', pg_snapshot_xmin(latest), pg_snapshot_xmax(latest),
                (SELECT string_agg(xid::text, ',' ORDER BY xid)
                 FROM (SELECT pg_snapshot_xip(latest) UNION SELECT pg_current_xact_id()) AS open (xid))
            )::pg_snapshot
        ELSE latest END
    ) AS snapshot
    FROM pg_current_snapshot() AS latest
    WHERE EXISTS (SELECT FROM consumer)  -- else the transaction would get an id, and write
),
page AS MATERIALIZED (
    SELECT * FROM (
        -- Late: transactions that were open in the cursor. One index probe each, however
        -- many rows others wrote meanwhile; LATERAL, because = ANY would sort every page. A range
        -- of one xid, because the planner would take the order of the primary key for xid = open.xid
        -- and read all of the table, where one transaction published all that it knows of.
        (
            SELECT late.*
            FROM horizon,
                pg_snapshot_xip((SELECT "cursor" FROM consumer)) AS open (xid),
                LATERAL (
                    SELECT xid, id, subject, schedule_at, resource_key, created_at
                    FROM kanthorq_django_event
                    WHERE stream_id = (SELECT stream_id FROM consumer)
                        AND xid >= open.xid AND xid <= open.xid
                        AND id > CASE WHEN open.xid = (SELECT start_xid FROM consumer)
                            THEN (SELECT start_id FROM consumer)
                            ELSE '00000000-0000-0000-0000-000000000000'::uuid END
                    ORDER BY xid, id
                    LIMIT %(page_size)s
                ) AS late
            WHERE pg_visible_in_snapshot(open.xid, horizon.snapshot)
                AND open.xid >= (SELECT start_xid FROM consumer)
            ORDER BY late.xid, late.id
            LIMIT %(page_size)s
        )
        UNION ALL
        -- Fresh: transactions that began after the cursor. One folded row comparison: with two
        -- conditions the index scan would start at the smaller and wade through all between.
        (
            SELECT xid, id, subject, schedule_at, resource_key, created_at
            FROM kanthorq_django_event
            WHERE stream_id = (SELECT stream_id FROM consumer)
                AND (xid, id) > (
                    (SELECT greatest(start_xid, pg_snapshot_xmax("cursor")) FROM consumer),
                    (SELECT CASE WHEN start_xid >= pg_snapshot_xmax("cursor") THEN start_id
                        ELSE '00000000-0000-0000-0000-000000000000'::uuid END FROM consumer)
                )
                AND xid < (SELECT pg_snapshot_xmax(snapshot) FROM horizon)
                AND pg_visible_in_snapshot(xid, (SELECT snapshot FROM horizon))
            ORDER BY xid, id
            LIMIT %(page_size)s
        )
    ) AS unread
    ORDER BY xid, id
    LIMIT %(page_size)s
),
matching AS MATERIALIZED (
    SELECT page.*
    FROM page, consumer
    WHERE page.subject ~ %(includes)s
        AND page.subject !~ %(excludes)s
        AND (consumer.deliver_from IS NULL OR page.created_at >= consumer.deliver_from)
    ORDER BY page.xid, page.id
    LIMIT %(limit)s
),
pulled AS (
    INSERT INTO kanthorq_django_task (
        consumer_id, event_id, resource_key, turn_key, state, schedule_at,
        attempt_count, lease_epoch, attempted_at
    )
    SELECT
        consumer.id, matching.id, matching.resource_key, turn.key,
        CASE WHEN consumer.parked THEN 0 WHEN leased THEN 2 ELSE 1 END,
        CASE WHEN leased THEN statement_timestamp() + %(visibility_timeout)s::interval
            ELSE coalesce(matching.schedule_at, statement_timestamp()) END,
        leased::int, leased::int, CASE WHEN leased THEN statement_timestamp() END
    FROM matching, consumer,
        -- What is serialized by key waits for its turn, which only a claim can tell.
        LATERAL (SELECT CASE WHEN consumer.serialize <> '' AND matching.resource_key <> ''
            THEN matching.resource_key END) AS turn (key),
        LATERAL (SELECT NOT consumer.parked AND turn.key IS NULL
            AND coalesce(matching.schedule_at <= statement_timestamp(), true)) AS due (leased)
    ORDER BY matching.xid, matching.id
    -- Never met while the cursor is right; the second line of defence.
    ON CONFLICT (consumer_id, event_id) DO NOTHING
    RETURNING *
),
progress AS MATERIALIZED (
    SELECT is_full, read_count, is_full OR read_count = %(page_size)s AS has_more
    FROM (
        SELECT
            is_full,
            -- Not counted behind a full room: the page is then read no further than its last match.
            CASE WHEN is_full THEN %(limit)s ELSE (SELECT count(*) FROM page) END AS read_count
        FROM (SELECT (SELECT count(*) FROM matching) = %(limit)s AS is_full) AS matched
    ) AS counts
),
last_read AS (
    -- A full room stops at its last match; what follows it is read again by the next pull.
    (SELECT xid, id FROM matching, progress WHERE is_full ORDER BY xid DESC, id DESC LIMIT 1)
    UNION ALL
    (SELECT xid, id FROM page, progress WHERE NOT is_full ORDER BY xid DESC, id DESC LIMIT 1)
),
advanced AS (
    UPDATE kanthorq_django_consumer AS consumer
    SET
        "cursor" = CASE WHEN has_more THEN consumer."cursor" ELSE horizon.snapshot END,
        "window" = CASE WHEN has_more THEN horizon.snapshot END,
        position_xid = CASE WHEN has_more THEN (SELECT xid FROM last_read) END,
        position_id = CASE WHEN has_more THEN (SELECT id FROM last_read) END
    FROM progress, horizon
    WHERE consumer.id = %(consumer_id)s
        -- An idle look writes nothing; an empty page that closes a window does.
        AND (progress.read_count > 0 OR (SELECT "window" FROM consumer) IS NOT NULL)
)
SELECT
    EXISTS (SELECT FROM consumer) AS is_read,
    -- Nothing was read and no window was open: the consumer has caught up.
    progress.read_count = 0 AND (SELECT "window" FROM consumer) IS NULL AS is_idle,
    -- A cursor that is ahead of this cluster, or an event that is, came from another one; or a
    -- transaction is open that a cursor saw ended: see mend_cursor.sql. A cast
    -- that fails is how plain SQL raises an error, before the COMMIT that is sent along.
    CASE WHEN NOT EXISTS (SELECT FROM consumer) OR (
        (SELECT
            pg_snapshot_xmax("cursor") <= pg_snapshot_xmax(pg_current_snapshot())
            AND greatest(pg_snapshot_xmin("cursor"), pg_snapshot_xmin("window"))
                <= pg_snapshot_xmin(pg_current_snapshot())
        FROM consumer)
        AND (
            SELECT id FROM kanthorq_django_event
            WHERE stream_id = (SELECT stream_id FROM consumer)
                AND xid >= pg_snapshot_xmax(pg_current_snapshot())
                AND xid <> pg_current_xact_id()
            ORDER BY xid, id LIMIT 1  -- keeps the planner on the index
        ) IS NULL
    ) THEN true ELSE ('another cluster, beyond ' || pg_current_snapshot()::text)::boolean END
        AS is_sane,
    -- Named: the server keeps the statement, and its columns may not change meanwhile. Moments
    -- as microseconds since 1970: Python takes twenty times as long to read them as text.
    pulled.id,
    pulled.lease_epoch,
    pulled.state,
    pulled.attempt_count AS attempt,
    pulled.consumer_id,
    pulled.event_id,
    pulled.resource_key,
    pulled.turn_key,
    pulled.attempt_count,
    pulled.attempted_errors,
    pulled.cancel_attempt_count,
    pulled.result,
    (extract(epoch FROM pulled.schedule_at) * 1000000)::bigint AS schedule_at,
    (extract(epoch FROM pulled.attempted_at) * 1000000)::bigint AS attempted_at,
    (extract(epoch FROM pulled.cancel_requested_at) * 1000000)::bigint AS cancel_requested_at,
    (extract(epoch FROM pulled.finalized_at) * 1000000)::bigint AS finalized_at,
    (extract(epoch FROM pulled.created_at) * 1000000)::bigint AS created_at,
    event.subject AS event_subject,
    event.body AS event_body,
    event.metadata AS event_metadata,
    event.idempotency_key AS event_idempotency_key,
    event.xid::text::bigint AS event_xid,
    (extract(epoch FROM event.schedule_at) * 1000000)::bigint AS event_schedule_at,
    (extract(epoch FROM event.created_at) * 1000000)::bigint AS event_created_at
FROM progress
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
