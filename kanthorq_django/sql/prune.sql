-- Delete events and their tasks, but leave an event whose tasks are not all final any more or
-- are locked by somebody, most likely an operator who resets them. Nothing here ever waits, so
-- nothing here can deadlock.
WITH final AS MATERIALIZED (
    SELECT id, event_id
    FROM kanthorq_django_task
    WHERE event_id = ANY(%(ids)s::uuid[])
        AND finalized_at < statement_timestamp() - %(older_than)s::interval
    ORDER BY id
    FOR UPDATE SKIP LOCKED
),
kept AS MATERIALIZED (
    -- By the ids once more: joined to them, the planner would read all tasks for each batch.
    SELECT event_id
    FROM kanthorq_django_task
    WHERE event_id = ANY(%(ids)s::uuid[]) AND id NOT IN (SELECT id FROM final)
),
spent AS MATERIALIZED (
    SELECT given.id
    FROM unnest(%(ids)s::uuid[]) AS given (id)
    WHERE given.id NOT IN (SELECT event_id FROM kept)
),
pruned_task AS (
    DELETE FROM kanthorq_django_task AS task
    USING final, spent
    WHERE task.id = final.id AND final.event_id = spent.id
    RETURNING task.id
),
pruned_event AS (
    DELETE FROM kanthorq_django_event AS event
    USING spent
    WHERE event.id = spent.id
    RETURNING event.id
)
SELECT
    ARRAY(SELECT id FROM pruned_event ORDER BY id) AS event_ids,
    (SELECT count(*) FROM pruned_task) AS task_count;
