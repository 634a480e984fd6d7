-- Extend the leases in flight, and learn how they stand. A row that somebody has locked, most
-- likely our own handler that acknowledges inside its transaction, is skipped: waiting for it
-- would let all the other leases run out. One that ran out while it had its key's turn is lost:
-- another task of that key may have the turn by now.
WITH held AS (
    SELECT * FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[], %(extensions)s::interval[])
        AS given (id, lease_epoch, since, extension)
),
renewable AS MATERIALIZED (
    SELECT held.*
    FROM kanthorq_django_task AS task
    JOIN held ON held.id = task.id AND held.lease_epoch = task.lease_epoch
        AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + held.since * interval '1 microsecond'
    WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3)  -- as in ack.sql
        AND (task.turn_key IS NULL OR task.state = 3 OR task.schedule_at > statement_timestamp())
    ORDER BY task.id
    FOR NO KEY UPDATE OF task SKIP LOCKED
),
renewed AS (
    UPDATE kanthorq_django_task AS task
    SET schedule_at = greatest(task.schedule_at, statement_timestamp() + renewable.extension)
    FROM renewable
    WHERE task.id = renewable.id
    RETURNING renewable.*
)
SELECT
    held.id,
    held.lease_epoch,
    held.since,
    renewed.id IS NOT NULL AS is_renewed,
    task.lease_epoch IS NOT DISTINCT FROM held.lease_epoch AND task.state IN (2, 3)
        AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + held.since * interval '1 microsecond'
        AND (task.turn_key IS NULL OR task.state = 3 OR task.schedule_at > statement_timestamp())
        AS is_ours,
    task.cancel_requested_at IS NOT NULL AND task.state = 2 AS is_cancelled
FROM held
LEFT JOIN kanthorq_django_task AS task ON task.id = held.id AND task.id = ANY(%(ids)s::bigint[])
LEFT JOIN renewed
    ON (renewed.id, renewed.lease_epoch) = (held.id, held.lease_epoch)
    AND renewed.since IS NOT DISTINCT FROM held.since;
