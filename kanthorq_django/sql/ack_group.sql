-- What ack_last.sql does, for the tasks of handlers that share a transaction: unless every lease is
-- still the one that was handed out it fails, and nothing is committed.
WITH ours AS MATERIALIZED (
    -- By place: a join of the arrays' rows, planned for ten, would go through all for each.
    SELECT task.id, nullif((%(results)s::text[])[place], '')::jsonb AS result  -- as in ack.sql
    FROM kanthorq_django_task AS task,
        LATERAL (SELECT array_position(%(ids)s::bigint[], task.id)) AS given (place)
    WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3)
        AND task.lease_epoch = (%(epochs)s::bigint[])[place]
        AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + (%(since)s::bigint[])[place] * interval '1 microsecond'
    ORDER BY task.id
    FOR NO KEY UPDATE OF task
),
ended AS (
    UPDATE kanthorq_django_task AS task
    SET
        state = CASE task.state WHEN 2 THEN 101 ELSE -101 END,
        result = CASE task.state WHEN 2 THEN ours.result ELSE task.result END,
        finalized_at = statement_timestamp()
    FROM ours
    WHERE task.id = ours.id
    RETURNING task.id
)
SELECT CASE count(*) WHEN cardinality(%(ids)s::bigint[]) THEN 1
    ELSE (count(*) || ' of ' || cardinality(%(ids)s::bigint[]) || ' leases held')::int END
FROM ended;
