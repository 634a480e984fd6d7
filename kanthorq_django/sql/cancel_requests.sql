-- Which of these leases belong to running tasks that somebody asked to cancel?
SELECT task.id, task.lease_epoch, held.since
FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[])
    AS held (id, lease_epoch, since)
JOIN kanthorq_django_task AS task
    ON task.id = held.id AND task.lease_epoch = held.lease_epoch
    AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + held.since * interval '1 microsecond'
WHERE task.id = ANY(%(ids)s::bigint[])  -- as in ack.sql
    AND task.state + 0 = 2 AND task.cancel_requested_at IS NOT NULL;
