-- How every consumer's tasks stand, from the front of one partial index: constant cost, however
-- many tasks there are.
SELECT
    consumer.id,
    consumer.name,
    consumer.cluster_id <> (SELECT system_identifier FROM pg_control_system()) AS is_foreign,
    statement_timestamp() - due.since AS oldest_due,
    stuck.count AS stuck_count
FROM kanthorq_django_consumer AS consumer,
    LATERAL (
        SELECT min(schedule_at) AS since
        FROM kanthorq_django_task
        WHERE consumer_id = consumer.id
            AND state IN (1, 2, 3, 102)
            AND schedule_at <= statement_timestamp()
    ) AS due,
    LATERAL (
        SELECT count(*)
        FROM (
            SELECT state FROM kanthorq_django_task
            WHERE consumer_id = consumer.id
                AND state IN (1, 2, 3, 102)
                AND schedule_at <= statement_timestamp() - %(stuck_after)s::interval
            ORDER BY schedule_at, id
            LIMIT %(looked_at)s
        ) AS overdue
        WHERE state = 2
    ) AS stuck
ORDER BY consumer.name;
