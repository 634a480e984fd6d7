-- What last_leases.sql tells, of one, as its plan may be kept.
SELECT state
FROM kanthorq_django_task
WHERE id = %(id)s AND lease_epoch = %(lease_epoch)s
    AND attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + %(since)s::bigint * interval '1 microsecond';
