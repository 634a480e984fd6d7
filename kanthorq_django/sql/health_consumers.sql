-- How every consumer's tasks stand, from the front of two partial indexes, that of tasks which take
-- turns and that of all others: however many tasks there are, a bounded number of them is read.
-- Each half spells out its index's condition; without all of it, the whole table would be read.
SELECT
    consumer.id,
    consumer.name,
    consumer.cluster_id <> (SELECT system_identifier FROM pg_control_system()) AS is_foreign,
    statement_timestamp() - due.since AS oldest_due,
    stuck.count AS stuck_count
FROM kanthorq_django_consumer AS consumer,
    LATERAL (
        SELECT min(greatest(schedule_at, '0002-01-01 00:00Z')) AS since  -- as in peek.sql
        FROM (
            (
                SELECT schedule_at
                FROM kanthorq_django_task
                WHERE consumer_id = consumer.id
                    AND state IN (1, 2, 3, 102) AND (turn_key IS NULL OR state = 3)
                    AND schedule_at <= statement_timestamp()
                ORDER BY schedule_at, id
                LIMIT 1
            )
            UNION ALL
            (
                SELECT schedule_at
                FROM kanthorq_django_task
                WHERE consumer_id = consumer.id
                    AND turn_key IS NOT NULL AND state IN (1, 2, 102)
                    AND schedule_at <= statement_timestamp()
                ORDER BY schedule_at
                LIMIT 1
            )
        ) AS first
    ) AS due,
    LATERAL (
        SELECT count(*)
        FROM (
            (
                SELECT state
                FROM kanthorq_django_task
                WHERE consumer_id = consumer.id
                    AND state IN (1, 2, 3, 102) AND (turn_key IS NULL OR state = 3)
                    AND schedule_at <= statement_timestamp() - %(stuck_after)s::interval
                ORDER BY schedule_at, id
                LIMIT %(looked_at)s
            )
            UNION ALL
            (
                SELECT state
                FROM kanthorq_django_task
                WHERE consumer_id = consumer.id
                    AND turn_key IS NOT NULL AND state IN (1, 2, 102)
                    AND schedule_at <= statement_timestamp() - %(stuck_after)s::interval
                ORDER BY schedule_at
                LIMIT %(looked_at)s
            )
        ) AS overdue
        WHERE state = 2
    ) AS stuck
ORDER BY consumer.name;
