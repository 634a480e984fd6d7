-- What ack_last.sql does, for the tasks of handlers that share a transaction: unless every lease is
-- still the one that was handed out it fails, and nothing is committed.
WITH verdict AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[], %(results)s::jsonb[])
        AS given (id, lease_epoch, since, result)
),
ours AS MATERIALIZED (
    SELECT task.id, verdict.result
    FROM kanthorq_django_task AS task
    JOIN verdict USING (id, lease_epoch)
    WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3)
        AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + verdict.since * interval '1 microsecond'
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
