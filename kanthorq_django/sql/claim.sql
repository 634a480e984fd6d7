-- Lease the due tasks of one consumer: available, retryable, stuck and cancelling ones are
-- one index range. A lease that ran out is written into the task's history; what has no
-- attempt left, and what was asked to cancel meanwhile, ends here.
WITH consumer AS (
    SELECT * FROM kanthorq_django_consumer WHERE id = %(consumer_id)s
),
due_freely AS MATERIALIZED (
    SELECT
        id, event_id, state, attempt_count, cancel_attempt_count, cancel_requested_at, attempted_at,
        CASE state WHEN 3 THEN attempted_errors END AS attempted_errors,
        false AS is_in_turn, schedule_at AS due_at
    FROM kanthorq_django_task
    WHERE consumer_id = %(consumer_id)s
        -- Spelt out as in the partial index, so that it is provably enough.
        AND state IN (1, 2, 3, 102) AND (turn_key IS NULL OR state = 3)
        AND state = ANY(%(states)s::smallint[])
        AND schedule_at >= CASE WHEN %(floor)s::bigint > 0  -- as in peek.sql
            THEN 'epoch'::timestamptz + %(floor)s::bigint * interval '1 microsecond' ELSE '-infinity' END
        AND schedule_at <= statement_timestamp()
        -- One that is being cancelled waits for no turn any more. If it was given one just before, it is
        -- leased by that alone.
        AND id <> ALL(%(in_turn)s::bigint[])
    ORDER BY schedule_at, id
    LIMIT %(limit)s
    FOR NO KEY UPDATE SKIP LOCKED
),
due_in_turn AS MATERIALIZED (
    SELECT
        id, event_id, state, attempt_count, cancel_attempt_count, cancel_requested_at, attempted_at,
        CASE state WHEN 3 THEN attempted_errors END AS attempted_errors,
        true AS is_in_turn, NULL::timestamptz AS due_at, turn_key
    FROM kanthorq_django_task
    WHERE id = ANY(%(in_turn)s::bigint[])
        AND state + 0 = ANY(%(states)s::smallint[])
        AND schedule_at <= statement_timestamp()
    FOR NO KEY UPDATE SKIP LOCKED
),
-- Tasks whose lease ran out, but that are locked or not in the wanted states, so that they cannot be
-- leased anew here. Their former holders may run yet, and nothing fences them: so nothing of their
-- groups is leased. Looked for once, not for each task.
unfenced AS MATERIALIZED (
    SELECT turn_key
    FROM kanthorq_django_task
    WHERE id = ANY(%(in_turn)s::bigint[])
        AND state + 0 = 2 AND id NOT IN (SELECT id FROM due_in_turn)
),
due AS (
    -- No more than fits into the memory of who claims, as in pull.sql; so much of either kind, that
    -- none keeps the other waiting. In the order of turns.sql: what is cut off is the end of a group.
    SELECT
        found.*,
        event.body_size,
        sum(coalesce(event.body_size, 0)) OVER (  -- an event may be deleted
            PARTITION BY is_in_turn ORDER BY due_at, state <> 2, id ROWS UNBOUNDED PRECEDING
        ) <= greatest(%(size_max)s::bigint, event.body_size) AS fits
    FROM (
        SELECT
            id, event_id, state, attempt_count, cancel_attempt_count, cancel_requested_at,
            attempted_at, attempted_errors, is_in_turn, due_at
        FROM due_in_turn
        WHERE NOT EXISTS (SELECT FROM unfenced WHERE unfenced.turn_key = due_in_turn.turn_key)
        UNION ALL SELECT * FROM due_freely
    ) AS found
    LEFT JOIN LATERAL (  -- as in pull.sql
        SELECT octet_length(body) AS body_size FROM kanthorq_django_event
        WHERE id >= found.event_id AND id <= found.event_id
        ORDER BY id
        LIMIT 1
    ) AS event ON true
),
fate AS (
    SELECT
        due.id,
        due.state AS was,
        CASE
            WHEN due.state = 3 AND NOT consumer.has_cancel_handler THEN -101
            WHEN due.state = 3 AND due.cancel_attempt_count >= consumer.cancel_attempt_max THEN -102
            WHEN due.state = 3 THEN 3
            WHEN due.state = 2 AND due.cancel_requested_at IS NOT NULL
                THEN CASE WHEN consumer.has_cancel_handler THEN 3 ELSE -101 END
            WHEN due.state = 2 AND due.attempt_count >= consumer.attempt_max THEN -102
            ELSE 2
        END AS becomes,
        -- Whether the history tells of the last attempt of this cancellation, and not only of one of
        -- an earlier cancellation: by its time. One that was handed back has no time. The last
        -- argument hides errors: a history may hold anything.
        jsonb_path_exists_tz(
            due.attempted_errors,
            '$[last] ? (@.verb == "cancel" && @.attempt == $attempt).at.datetime() ? (@ >= $since.datetime())',
            jsonb_build_object(
                'attempt', due.cancel_attempt_count, 'since', coalesce(due.attempted_at, 'epoch')
            ),
            true
        ) AS is_told,
        due.state = 3 AND due.cancel_attempt_count > 0 AND due.attempted_at IS NOT NULL AS was_tried,
        %(visibility_timeout)s::interval AS visibility_timeout
    FROM due, consumer
    WHERE due.fits
),
claimed AS (
    UPDATE kanthorq_django_task AS task
    SET
        state = fate.becomes,
        lease_epoch = task.lease_epoch + 1,
        attempt_count = task.attempt_count + (fate.becomes = 2)::int,
        cancel_attempt_count = CASE
            WHEN fate.becomes <> 3 THEN task.cancel_attempt_count
            WHEN fate.was = 3 THEN task.cancel_attempt_count + 1
            ELSE 1
        END,
        attempted_at = CASE WHEN fate.becomes > 0 THEN statement_timestamp() ELSE task.attempted_at END,
        schedule_at = CASE WHEN fate.becomes > 0
            THEN statement_timestamp() + fate.visibility_timeout ELSE task.schedule_at END,
        finalized_at = CASE WHEN fate.becomes < 0 THEN statement_timestamp() END,
        attempted_errors = CASE
            WHEN fate.was = 2 OR fate.becomes = -102 OR fate.was_tried AND fate.is_told IS NOT TRUE
            THEN jsonb_path_query_array(
                task.attempted_errors, '$[last - $before to last]',
                jsonb_build_object('before', %(errors_max)s - 2)
            )
            || jsonb_build_array(jsonb_build_object(
                'at', statement_timestamp(),
                'attempt', CASE fate.was WHEN 2 THEN task.attempt_count
                    ELSE task.cancel_attempt_count END,
                'verb', CASE fate.was WHEN 2 THEN 'handle' ELSE 'cancel' END,
                -- The second: the last attempt was nacked, and a nack that uses up all attempts ends
                -- the task. So the consumer has come to allow fewer of them since.
                'error', CASE WHEN fate.was = 2 THEN %(handler_ran_out)s::text
                    WHEN fate.is_told THEN %(no_attempt_left)s::text
                    ELSE %(lease_ran_out)s::text END,
                'stack', ''
            ))
            ELSE task.attempted_errors
        END
    FROM fate
    WHERE task.id = fate.id
    RETURNING task.*
)
SELECT
    -- Not of "due": if the consumer was deleted, nothing of that can be claimed, and a caller that
    -- claims again for as long as something is due would never end.
    (SELECT count(*) FROM fate) AS due_count,
    EXISTS (SELECT FROM due WHERE NOT fits) AS is_cut,
    (SELECT avg(body_size) FROM due WHERE fits)::bigint AS body_size,
    (SELECT count(*) FROM claimed WHERE state = -102) AS discarded_count,
    ARRAY(SELECT event_id::text FROM claimed WHERE state = -102 ORDER BY id LIMIT 20) AS discarded,
    -- Named: the server keeps the statement, and its columns may not change meanwhile. Moments
    -- as microseconds since 1970: Python takes twenty times as long to read them as text. Those that
    -- we do not set ourselves may be any that SQL can write: see pull.sql.
    claimed.id,
    claimed.lease_epoch,
    claimed.state,
    CASE claimed.state WHEN 3 THEN claimed.cancel_attempt_count ELSE claimed.attempt_count END AS attempt,
    claimed.consumer_id,
    claimed.event_id,
    claimed.resource_key,
    claimed.turn_key,
    claimed.attempt_count,
    claimed.attempted_errors::text,
    claimed.cancel_attempt_count,
    claimed.result::text,
    (extract(epoch FROM claimed.schedule_at) * 1000000)::bigint AS schedule_at,
    (extract(epoch FROM claimed.attempted_at) * 1000000)::bigint AS attempted_at,
    (extract(epoch FROM CASE WHEN claimed.cancel_requested_at < first THEN first
        WHEN claimed.cancel_requested_at > last THEN last
        ELSE claimed.cancel_requested_at END) * 1000000)::bigint AS cancel_requested_at,
    (extract(epoch FROM claimed.finalized_at) * 1000000)::bigint AS finalized_at,
    (extract(epoch FROM CASE WHEN claimed.created_at < first THEN first
        WHEN claimed.created_at > last THEN last
        ELSE claimed.created_at END) * 1000000)::bigint AS created_at,
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
LEFT JOIN claimed ON claimed.state IN (2, 3)
LEFT JOIN LATERAL (  -- as in pull.sql
    SELECT * FROM kanthorq_django_event
    WHERE id >= claimed.event_id AND id <= claimed.event_id
    ORDER BY id
    LIMIT 1
) AS event ON true
ORDER BY claimed.id;
