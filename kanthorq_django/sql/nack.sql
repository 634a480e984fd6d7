-- Nack leased tasks, each only while its lease is the one that was handed out. A task that was
-- asked to cancel goes to its cancellation instead of a retry; a cancellation handler has an
-- attempt counter of its own. Returns the new states of those that were ours.
WITH verdict AS MATERIALIZED (
    SELECT *
    FROM unnest(
        %(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[], %(delays)s::interval[],
        %(finals)s::boolean[], %(errors)s::text[], %(stacks)s::text[]
    ) AS given (id, lease_epoch, since, delay, is_final, error, stack)
),
ours AS MATERIALIZED (
    SELECT
        verdict.*,
        task.state AS was,
        CASE
            WHEN task.state = 3 AND task.cancel_attempt_count < consumer.cancel_attempt_max
                AND NOT verdict.is_final THEN 3
            WHEN task.state = 3 THEN -102
            WHEN task.cancel_requested_at IS NOT NULL
                THEN CASE WHEN consumer.has_cancel_handler THEN 3 ELSE -101 END
            WHEN task.attempt_count < consumer.attempt_max AND NOT verdict.is_final THEN 102
            ELSE -102
        END AS becomes
    FROM kanthorq_django_task AS task
    JOIN verdict USING (id, lease_epoch)
    -- LEFT: a consumer that somebody deleted past its model must not keep the verdict out for ever.
    LEFT JOIN kanthorq_django_consumer AS consumer ON consumer.id = task.consumer_id
    WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3)  -- as in ack.sql
        AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + verdict.since * interval '1 microsecond'
    ORDER BY task.id
    FOR NO KEY UPDATE OF task /* SKIP LOCKED */
)
UPDATE kanthorq_django_task AS task
SET
    state = ours.becomes,
    -- A cancelling task stays claimable and leasable: a new epoch ends the old lease.
    lease_epoch = task.lease_epoch + (ours.becomes = 3)::int,
    schedule_at = CASE
        WHEN ours.becomes = 3 AND ours.was = 2 THEN statement_timestamp()
        WHEN ours.becomes > 0 THEN statement_timestamp() + ours.delay
        ELSE task.schedule_at
    END,
    cancel_attempt_count = CASE WHEN ours.becomes = 3 AND ours.was = 2 THEN 0
        ELSE task.cancel_attempt_count END,
    finalized_at = CASE WHEN ours.becomes < 0 THEN statement_timestamp() END,
    attempted_errors =
        -- The newest of the old ones, one less than may stay.
        jsonb_path_query_array(
            task.attempted_errors, '$[last - $before to last]',
            jsonb_build_object('before', %(errors_max)s - 2)
        )
        || jsonb_build_array(jsonb_build_object(
            'at', statement_timestamp(),
            'attempt', CASE ours.was WHEN 2 THEN task.attempt_count ELSE task.cancel_attempt_count END,
            'verb', CASE ours.was WHEN 2 THEN 'handle' ELSE 'cancel' END,
            'error', ours.error,
            'stack', ours.stack
        ))
FROM ours
WHERE task.id = ours.id
RETURNING task.id, task.state;
