-- Which of these leases belong to running tasks that somebody asked to cancel?
SELECT task.id, task.lease_epoch
FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[]) AS held (id, lease_epoch)
JOIN kanthorq_django_task AS task
    ON task.id = held.id AND task.lease_epoch = held.lease_epoch
WHERE task.id = ANY(%(ids)s::bigint[])  -- as in ack.sql
    AND task.state + 0 = 2 AND task.cancel_requested_at IS NOT NULL;
