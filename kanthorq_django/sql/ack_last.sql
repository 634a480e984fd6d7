-- What ack_one.sql does, as the last statement of a transaction whose COMMIT is sent along with
-- it: unless the lease is still the one that was handed out it fails, and nothing is committed.
WITH ended AS (
    UPDATE kanthorq_django_task
    SET
        state = CASE state WHEN 2 THEN 101 ELSE -101 END,
        result = CASE state WHEN 2 THEN %(result)s::jsonb ELSE result END,
        finalized_at = statement_timestamp()
    WHERE id = %(id)s AND lease_epoch = %(lease_epoch)s
        AND attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + %(since)s::bigint * interval '1 microsecond'
        AND state + 0 IN (2, 3)
    RETURNING id
)
-- A cast that fails is how plain SQL raises an error that says something.
SELECT CASE count(*) WHEN 1 THEN 1 ELSE (count(*) || ' of 1 leases held')::int END FROM ended;
