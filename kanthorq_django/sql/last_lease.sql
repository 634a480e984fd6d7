-- last_leases.sql for a single lease: without arrays the server can keep its plan.
SELECT state
FROM kanthorq_django_task
WHERE id = %(id)s AND lease_epoch = %(lease_epoch)s
    AND attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + %(since)s::bigint * interval '1 microsecond';
