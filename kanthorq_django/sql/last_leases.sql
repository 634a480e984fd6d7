-- In what state are the tasks of which these are the last leases? Where it is none of those of leased
-- tasks, their holders have ended them. Locks nothing and waits for nobody.
SELECT task.id, task.lease_epoch, given.since, task.state
FROM unnest(%(ids)s::bigint[], %(epochs)s::bigint[], %(since)s::bigint[])
    AS given (id, lease_epoch, since)
JOIN kanthorq_django_task AS task
    ON task.id = given.id AND task.lease_epoch = given.lease_epoch
    AND task.attempted_at IS NOT DISTINCT FROM 'epoch'::timestamptz + given.since * interval '1 microsecond'
WHERE task.id = ANY(%(ids)s::bigint[]);
