-- Whose turn is it among the tasks of a consumer that serializes by key? The caller holds the
-- consumer's lock, so nobody else starts one meanwhile. Jumps from key to key through the
-- index, starting after the key that was served last, so that no key is passed over for long. Where
-- few tasks are due it takes their keys alone: tasks for later may have hundreds of thousands of keys.
-- How many are few is for the caller to say: one busy key may have more due tasks than keys are looked at.
-- A key is busy while one of its tasks has a live lease. Otherwise its first due task is next;
-- strictly, a task that waits for its retry keeps the ones behind it waiting as well.
WITH RECURSIVE due AS MATERIALIZED (
    SELECT turn_key
    FROM kanthorq_django_task
    WHERE consumer_id = %(consumer_id)s
        AND turn_key IS NOT NULL AND state IN (1, 2, 102)
        AND schedule_at <= statement_timestamp()
    ORDER BY schedule_at
    LIMIT %(due_max)s
),
walked (turn_key, position) AS (
    (
        SELECT turn_key, 1
        FROM kanthorq_django_task
        WHERE consumer_id = %(consumer_id)s AND turn_key > %(after_key)s AND state IN (1, 2, 102)
            AND (SELECT count(*) FROM due) = %(due_max)s
        ORDER BY turn_key
        LIMIT 1
    )
    UNION ALL
    SELECT
        (
            SELECT task.turn_key
            FROM kanthorq_django_task AS task
            WHERE task.consumer_id = %(consumer_id)s
                AND task.turn_key > walked.turn_key
                AND task.state IN (1, 2, 102)
            ORDER BY task.turn_key
            LIMIT 1
        ),
        walked.position + 1
    FROM walked
    WHERE walked.turn_key IS NOT NULL AND walked.position < %(keys_max)s
),
keys (turn_key, position) AS (
    SELECT turn_key, position FROM walked WHERE turn_key IS NOT NULL
    UNION ALL
    SELECT turn_key, row_number() OVER (ORDER BY turn_key)
    FROM (
        SELECT DISTINCT turn_key
        FROM due
        WHERE turn_key > %(after_key)s AND (SELECT count(*) FROM due) < %(due_max)s
        ORDER BY turn_key
        LIMIT %(keys_max)s
    ) AS few
),
next AS (
    SELECT keys.turn_key, keys.position, head.place, head.id, head.is_ready
    FROM keys
    LEFT JOIN LATERAL (
        SELECT
            task.place,
            task.id,
            bool_and(task.schedule_at <= statement_timestamp()) OVER so_far
                -- Strictly, what failed before is a group of its own: it may fail again.
                AND (
                    NOT %(is_strict)s
                    OR row_number() OVER so_far = 1
                    OR NOT bool_or(task.attempt_count > 0) OVER so_far
                ) AS is_ready
        FROM (
            -- A lease that ran out first: to claim it anew is what fences its old holder.
            (
                SELECT id, schedule_at, attempt_count, 1 AS place
                FROM kanthorq_django_task
                WHERE consumer_id = %(consumer_id)s AND turn_key = keys.turn_key AND state = 2
                ORDER BY id
                LIMIT %(per_key)s
            )
            UNION ALL
            (
                SELECT id, schedule_at, attempt_count, 2
                FROM kanthorq_django_task
                WHERE consumer_id = %(consumer_id)s
                    AND turn_key = keys.turn_key
                    AND state IN (1, 102)
                    AND (schedule_at <= statement_timestamp() OR (%(is_strict)s AND state = 102))
                ORDER BY id
                LIMIT %(per_key)s
            )
            ORDER BY place, id
            LIMIT %(per_key)s
        ) AS task
        WHERE NOT EXISTS (
            SELECT FROM kanthorq_django_task AS running
            WHERE running.consumer_id = %(consumer_id)s
                AND running.turn_key = keys.turn_key
                AND running.state = 2
                AND running.schedule_at > statement_timestamp()
        )
        WINDOW so_far AS (ORDER BY task.place, task.id)
    ) AS head ON head.is_ready
)
SELECT id, turn_key, position
FROM next
WHERE id IS NOT NULL OR position = %(keys_max)s
ORDER BY position, place, id  -- a group that is cut short keeps its lost leases
LIMIT %(limit)s;
