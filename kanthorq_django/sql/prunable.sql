-- One page of a stream, and which of its events may go: every consumer has read them, and all
-- their tasks have been final for long enough. Age alone must not decide: a transaction that
-- was open for days commits events that are old already, and unread. Reads only.
WITH page AS MATERIALIZED (
    SELECT
        id,
        xid,
        created_at < statement_timestamp() - %(older_than)s::interval AS is_old
    FROM kanthorq_django_event
    WHERE stream_id = %(stream_id)s
        AND (xid, id) > (%(after_xid)s::xid8, %(after_id)s::uuid)
    ORDER BY xid, id
    LIMIT %(batch)s
)
SELECT
    page.id,
    page.xid::text AS xid,
    page.is_old,
    page.is_old
        AND NOT EXISTS (
            SELECT FROM kanthorq_django_consumer AS consumer
            WHERE consumer.stream_id = %(stream_id)s
                AND NOT (
                    pg_visible_in_snapshot(page.xid, consumer."cursor")
                    -- Transaction ids of another cluster say nothing about ours.
                    AND consumer.cluster_id = (SELECT system_identifier FROM pg_control_system())
                )
        )
        AND coalesce(tasks.are_final, true) AS is_prunable,
    tasks.task_count
FROM page
LEFT JOIN LATERAL (
    SELECT
        count(*) AS task_count,
        bool_and(
            coalesce(
                task.finalized_at < statement_timestamp() - %(older_than)s::interval, false
            )
        ) AS are_final
    FROM kanthorq_django_task AS task
    WHERE task.event_id = page.id
) AS tasks ON page.is_old
ORDER BY page.xid, page.id;
