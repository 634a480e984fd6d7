-- Lock the consumers of some tasks, so that none begins or ceases to serialize until the transaction
-- ends. A verb that lets tasks run again reads that rule; align_turns.sql, where the rule is changed,
-- has to find the tasks either before that or after it. The weakest lock there is: pulls and claims do
-- not wait for it; who changes the rule takes one that does.
SELECT id
FROM kanthorq_django_consumer
WHERE id IN (SELECT consumer_id FROM kanthorq_django_task WHERE id = ANY(%(task_ids)s::bigint[]))
ORDER BY id
FOR KEY SHARE;
