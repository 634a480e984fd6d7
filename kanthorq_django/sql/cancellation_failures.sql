-- Why cancellation handlers of consumers failed of late, the most frequent reason first. Of the
-- tasks that cancellations.sql looks at, and of those that are being cancelled now, it reads the
-- histories of so many whose handler failed. Errors that differ by numbers alone are one reason,
-- told by its newest error. Reads only.
WITH failing AS (
    SELECT asked.consumer_id, ended.id, ended.attempted_errors
    FROM unnest(%(consumer_ids)s::bigint[]) AS asked (consumer_id)
    CROSS JOIN LATERAL (
        (
            SELECT id, attempted_errors
            FROM (
                SELECT * FROM kanthorq_django_task
                WHERE consumer_id = asked.consumer_id AND state = -101
                ORDER BY id DESC
                LIMIT %(limit)s
            ) AS cancelled
            -- A handler that succeeded at once has nothing to tell. But one may have failed on its only
            -- attempt, and have been taken out of the code then.
            WHERE (cancel_attempt_count > 1 OR (attempted_errors -> -1) @> '{"verb": "cancel"}')
                AND cancel_attempt_count > 0
                AND finalized_at > statement_timestamp() - %(lately)s::interval
            ORDER BY id DESC
            LIMIT %(histories)s
        )
        UNION ALL
        (
            SELECT id, attempted_errors
            FROM (
                SELECT * FROM kanthorq_django_task
                WHERE consumer_id = asked.consumer_id AND state = -102
                ORDER BY id DESC
                LIMIT %(limit)s
            ) AS discarded
            WHERE cancel_attempt_count > 0 AND cancel_requested_at IS NOT NULL
                AND finalized_at > statement_timestamp() - %(lately)s::interval
            ORDER BY id DESC
            LIMIT %(histories)s
        )
        UNION ALL
        (
            SELECT id, attempted_errors
            FROM (
                SELECT * FROM kanthorq_django_task
                WHERE consumer_id = asked.consumer_id
                    AND state IN (1, 2, 3, 102) AND (turn_key IS NULL OR state = 3)
                ORDER BY schedule_at, id
                LIMIT %(limit)s
            ) AS claimable
            WHERE state = 3 AND cancel_attempt_count > 0
            LIMIT %(histories)s
        )
    ) AS ended
),
reason AS (
    SELECT
        failing.consumer_id,
        count(*) AS count,
        (array_agg(failure.error ORDER BY failing.id DESC))[1] AS error
    FROM failing
    CROSS JOIN LATERAL (
        SELECT left(found.error #>> '{}', %(error_size)s) AS error
        FROM jsonb_path_query(
            failing.attempted_errors, 'lax $[*] ? (@.verb == "cancel").error'
        ) AS found (error)
    ) AS failure
    GROUP BY failing.consumer_id,
        regexp_replace(failure.error, '[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]+', '#', 'g')
),
ranked AS (
    SELECT *, row_number() OVER (PARTITION BY consumer_id ORDER BY count DESC, error) AS rank
    FROM reason
)
SELECT consumer_id, error, count FROM ranked WHERE rank <= %(reasons)s ORDER BY consumer_id, rank;
