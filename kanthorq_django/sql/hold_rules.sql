-- Keep the rules about keys of the consumers of some tasks as they are, until the transaction ends:
-- who moves a task back is to read the same rule as a change of it finds the task under. The weakest
-- lock there is: pulls and claims do not wait for it, a change of the consumer's key would.
SELECT id
FROM kanthorq_django_consumer
WHERE id IN (SELECT consumer_id FROM kanthorq_django_task WHERE id = ANY(%(task_ids)s::bigint[]))
ORDER BY id
FOR KEY SHARE;
