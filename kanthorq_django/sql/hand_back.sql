-- Give leased tasks back, uncounted: unstarted ones of a stopping worker at once, a snoozed
-- one after its delay. Returns the ids that were ours.
WITH handed AS (
    SELECT * FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[])
        AS given (id, lease_epoch, since)
),
ours AS MATERIALIZED (
    SELECT
        task.id,
        task.state AS was,
        CASE
            WHEN task.state = 3 THEN 3
            WHEN task.cancel_requested_at IS NULL THEN 1
            WHEN consumer.has_cancel_handler THEN 3
            ELSE -101
        END AS becomes
    FROM kanthorq_django_task AS task
    JOIN handed ON handed.id = task.id AND handed.lease_epoch = task.lease_epoch
    -- LEFT: a consumer that somebody deleted past its model must not keep the verdict out for ever.
    LEFT JOIN kanthorq_django_consumer AS consumer ON consumer.id = task.consumer_id
    WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3)  -- as in ack.sql
        AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + handed.since * interval '1 microsecond'
    ORDER BY task.id
    FOR NO KEY UPDATE OF task /* SKIP LOCKED */
)
UPDATE kanthorq_django_task AS task
SET
    state = ours.becomes,
    -- A cancelling task stays claimable and leasable: a new epoch ends the old lease.
    lease_epoch = task.lease_epoch + (ours.becomes = 3)::int,
    schedule_at = statement_timestamp()
        + CASE WHEN ours.was = 2 AND ours.becomes = 3 THEN interval '0' ELSE %(delay)s::interval END,
    attempt_count = task.attempt_count - (ours.was = 2)::int,
    cancel_attempt_count = CASE ours.was WHEN 3 THEN task.cancel_attempt_count - 1 ELSE 0 END,
    -- Else a claim would take it for a cleanup whose lease ran out.
    attempted_at = CASE WHEN ours.was <> 3 THEN task.attempted_at END,
    finalized_at = CASE WHEN ours.becomes < 0 THEN statement_timestamp() END
FROM ours
WHERE task.id = ours.id
RETURNING task.id;
