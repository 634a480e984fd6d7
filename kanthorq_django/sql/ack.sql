-- End leased tasks well, each only while its lease is the one that was handed out: a handled
-- task is completed, a handled cancellation is cancelled. Returns the ids that were ours. The
-- moment of the lease is part of its name: a crash that loses commits gives ids and epochs again.
WITH verdict AS MATERIALIZED (
    -- No result is an empty text, or a place beyond the end of the array: where array_nulls is off, no
    -- array can hold a NULL.
    SELECT id, lease_epoch, since, nullif(result, '')::jsonb AS result
    FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[], %(results)s::text[])
        AS given (id, lease_epoch, since, result)
),
ours AS MATERIALIZED (
    SELECT task.id, verdict.result
    FROM kanthorq_django_task AS task
    JOIN verdict USING (id, lease_epoch)
    -- Both keep the planner on the primary key: the ids once more, or it reads small tables
    -- from end to end; + 0, or it reads an index of unfinished tasks with all its dead entries.
    WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3)
        AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + verdict.since * interval '1 microsecond'
    ORDER BY task.id
    FOR NO KEY UPDATE OF task /* SKIP LOCKED */
)
UPDATE kanthorq_django_task AS task
SET
    state = CASE task.state WHEN 2 THEN 101 ELSE -101 END,
    result = CASE task.state WHEN 2 THEN ours.result ELSE task.result END,
    finalized_at = statement_timestamp()
FROM ours
WHERE task.id = ours.id
RETURNING task.id;
