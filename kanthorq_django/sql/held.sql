-- Which of these leases are still held? Locks nothing and waits for nobody.
SELECT task.id, task.lease_epoch, held.since
FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[])
    AS held (id, lease_epoch, since)
JOIN kanthorq_django_task AS task
    ON task.id = held.id AND task.lease_epoch = held.lease_epoch
    AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + held.since * interval '1 microsecond'
WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3);  -- as in ack.sql
