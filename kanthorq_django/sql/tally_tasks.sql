-- How many tasks consumers have in each state. What is unfinished or was set aside is counted by
-- its index, at most so many rows of a state (of all claimable states together, once with turns
-- and once without); completed tasks have no index, so they are counted in a sample of the
-- table's pages. Reads only.
SELECT asked.consumer_id, counted.state, counted.count, counted.stuck_count
FROM unnest(%(consumer_ids)s::bigint[]) AS asked (consumer_id)
CROSS JOIN LATERAL (
    (
        SELECT
            state,
            count(*) AS count,
            count(*) FILTER (WHERE state = 2 AND schedule_at <= statement_timestamp())
                AS stuck_count
        FROM (
            (
                SELECT state, schedule_at
                FROM kanthorq_django_task
                WHERE consumer_id = asked.consumer_id
                    AND state IN (1, 2, 3, 102) AND (turn_key IS NULL OR state = 3)
                ORDER BY schedule_at, id
                LIMIT %(limit)s
            )
            UNION ALL
            (
                SELECT state, schedule_at
                FROM kanthorq_django_task
                WHERE consumer_id = asked.consumer_id
                    AND state IN (1, 2, 102) AND turn_key IS NOT NULL
                ORDER BY turn_key, id
                LIMIT %(limit)s
            )
        ) AS claimable
        GROUP BY state
    )
    UNION ALL
    (
        SELECT 0, count(*), 0
        FROM (
            SELECT FROM kanthorq_django_task
            WHERE consumer_id = asked.consumer_id AND state = 0
            LIMIT %(limit)s
        ) AS pending
    )
    UNION ALL
    (
        SELECT -101, count(*), 0
        FROM (
            SELECT FROM kanthorq_django_task
            WHERE consumer_id = asked.consumer_id AND state = -101
            LIMIT %(limit)s
        ) AS cancelled
    )
    UNION ALL
    (
        SELECT -102, count(*), 0
        FROM (
            SELECT FROM kanthorq_django_task
            WHERE consumer_id = asked.consumer_id AND state = -102
            LIMIT %(limit)s
        ) AS discarded
    )
) AS counted
UNION ALL
SELECT consumer_id, 101, round(count(*) * 100 / %(percent)s)::bigint, 0
FROM kanthorq_django_task TABLESAMPLE SYSTEM (%(percent)s)
WHERE state = 101 AND consumer_id = ANY(%(consumer_ids)s::bigint[])
GROUP BY consumer_id;
