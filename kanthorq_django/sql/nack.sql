-- Nack one leased task, only while its lease is the one that was handed out. A task that was
-- asked to cancel goes to its cancellation instead of a retry; a cancellation handler has an
-- attempt counter of its own. Returns the new state, or no row when the lease was lost.
WITH ours AS MATERIALIZED (
    SELECT
        task.id,
        task.state AS was,
        CASE
            WHEN task.state = 3 AND task.cancel_attempt_count < consumer.cancel_attempt_max
                AND NOT %(is_final)s THEN 3
            WHEN task.state = 3 THEN -102
            WHEN task.cancel_requested_at IS NOT NULL
                THEN CASE WHEN consumer.has_cancel_handler THEN 3 ELSE -101 END
            WHEN task.attempt_count < consumer.attempt_max AND NOT %(is_final)s THEN 102
            ELSE -102
        END AS becomes
    FROM kanthorq_django_task AS task
    JOIN kanthorq_django_consumer AS consumer ON consumer.id = task.consumer_id
    WHERE task.id = %(id)s AND task.lease_epoch = %(lease_epoch)s AND task.state IN (2, 3)
    FOR NO KEY UPDATE OF task
)
UPDATE kanthorq_django_task AS task
SET
    state = ours.becomes,
    -- A cancelling task stays claimable and leasable: a new epoch ends the old lease.
    lease_epoch = task.lease_epoch + (ours.becomes = 3)::int,
    schedule_at = CASE
        WHEN ours.becomes = 3 AND ours.was = 2 THEN statement_timestamp()
        WHEN ours.becomes > 0 THEN statement_timestamp() + %(delay)s::interval
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
            'error', %(error)s::text,
            'stack', %(stack)s::text
        ))
FROM ours
WHERE task.id = ours.id
RETURNING task.state, task.schedule_at;
