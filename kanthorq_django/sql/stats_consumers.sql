-- Every consumer with its tasks by state, in one pass over the tasks. The counts are exact, so
-- the time grows with the table: about a second for some millions of tasks.
SELECT
    consumer.id,
    consumer.name,
    stream.name AS stream,
    coalesce(tasks.pending, 0) AS pending,
    coalesce(tasks.available, 0) AS available,
    coalesce(tasks.running, 0) AS running,
    coalesce(tasks.stuck, 0) AS stuck,
    coalesce(tasks.cancelling, 0) AS cancelling,
    coalesce(tasks.retryable, 0) AS retryable,
    coalesce(tasks.completed, 0) AS completed,
    coalesce(tasks.cancelled, 0) AS cancelled,
    coalesce(tasks.discarded, 0) AS discarded,
    statement_timestamp() - tasks.due_since AS oldest_due,
    coalesce(tasks.completed_lately, 0) AS completed_lately
FROM kanthorq_django_consumer AS consumer
JOIN kanthorq_django_stream AS stream ON stream.id = consumer.stream_id
LEFT JOIN (
    SELECT
        consumer_id,
        count(*) FILTER (WHERE state = 0) AS pending,
        count(*) FILTER (WHERE state = 1) AS available,
        count(*) FILTER (WHERE state = 2) AS running,
        count(*) FILTER (WHERE state = 2 AND schedule_at <= statement_timestamp()) AS stuck,
        count(*) FILTER (WHERE state = 3) AS cancelling,
        count(*) FILTER (WHERE state = 102) AS retryable,
        count(*) FILTER (WHERE state = 101) AS completed,
        count(*) FILTER (WHERE state = -101) AS cancelled,
        count(*) FILTER (WHERE state = -102) AS discarded,
        min(greatest(schedule_at, '0002-01-01 00:00Z')) FILTER (  -- as in peek.sql
            WHERE state IN (1, 2, 3, 102) AND schedule_at <= statement_timestamp()
        ) AS due_since,
        count(*) FILTER (
            WHERE state = 101 AND finalized_at > statement_timestamp() - %(lately)s::interval
        ) AS completed_lately
    FROM kanthorq_django_task
    GROUP BY consumer_id
) AS tasks ON tasks.consumer_id = consumer.id
ORDER BY stream.name, consumer.name;
