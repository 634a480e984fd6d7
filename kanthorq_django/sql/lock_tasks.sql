-- Lock all tasks of consumers that are being deleted, in the order of their ids as verbs do: the
-- deletion itself goes by where they lie, and would deadlock with a verb that holds the next one.
-- They are counted here, so that none of them travels.
SELECT count(*)
FROM (
    SELECT
    FROM kanthorq_django_task
    WHERE consumer_id = ANY(%(consumer_ids)s::bigint[])
    ORDER BY id
    FOR UPDATE
) AS locked;
