-- How the cancellations of consumers went of late: of the newest so many cancelled, and as many
-- discarded, tasks of each, those that ended within the window. The index of what was set aside
-- leads to them, so the cost has a bound, however many tasks there are. Reads only.
SELECT
    asked.consumer_id,
    count(*) FILTER (WHERE newest.state = -101) AS cancelled,
    -- A task may be cancelled although its handler failed: the handler was taken out of the code then.
    count(*) FILTER (
        WHERE newest.state = -101 AND newest.cancel_attempt_count > 0 AND newest.has_failed IS NOT TRUE
    ) AS succeeded,
    count(*) FILTER (WHERE newest.state = -102) AS failed,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY newest.finalized_at - newest.cancel_requested_at)
        AS median,
    max(newest.finalized_at - newest.cancel_requested_at) AS longest,
    bool_or(newest.read_count = %(limit)s) AS is_bounded
FROM unnest(%(consumer_ids)s::bigint[]) AS asked (consumer_id)
CROSS JOIN LATERAL (
    (
        SELECT *, count(*) OVER () AS read_count
        FROM (
            SELECT
                state, cancel_attempt_count, cancel_requested_at, finalized_at,
                jsonb_path_exists_tz(  -- as in claim.sql
                    attempted_errors,
                    '$[last] ? (@.verb == "cancel" && @.attempt == $attempt).at.datetime() ? (@ >= $since.datetime())',
                    jsonb_build_object(
                        'attempt', cancel_attempt_count, 'since', coalesce(attempted_at, 'epoch')
                    ),
                    true
                ) AS has_failed
            FROM kanthorq_django_task
            WHERE consumer_id = asked.consumer_id AND state = -101
            ORDER BY id DESC
            LIMIT %(limit)s
        ) AS cancelled
    )
    UNION ALL
    (
        SELECT *, count(*) OVER () AS read_count
        FROM (
            SELECT state, cancel_attempt_count, cancel_requested_at, finalized_at, NULL::boolean
            FROM kanthorq_django_task
            WHERE consumer_id = asked.consumer_id AND state = -102
            ORDER BY id DESC
            LIMIT %(limit)s
        ) AS discarded
    )
) AS newest
WHERE newest.finalized_at > statement_timestamp() - %(lately)s::interval
    -- Most discarded tasks were never asked to cancel. resume() clears the request of those
    -- that were, and keeps the count of what came of it.
    AND (
        newest.state = -101
        OR (newest.cancel_requested_at IS NOT NULL AND newest.cancel_attempt_count > 0)
    )
GROUP BY asked.consumer_id;
