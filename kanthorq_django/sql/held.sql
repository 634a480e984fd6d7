-- Which of these leases are still held? Locks nothing and waits for nobody.
SELECT task.id, task.lease_epoch
FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[]) AS held (id, lease_epoch)
JOIN kanthorq_django_task AS task
    ON task.id = held.id AND task.lease_epoch = held.lease_epoch
WHERE task.id = ANY(%(ids)s::bigint[]) AND task.state + 0 IN (2, 3);  -- as in ack.sql
