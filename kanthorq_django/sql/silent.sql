-- Which of these backends, whose clients wait for them, are not at work, and since when? What was
-- sent to them has been lost on the way, or their answer has; null: there is no such backend any
-- more. Behind a pooler the numbers are not those of backends, as our own one tells. Reads only.
SELECT asked.pid, backend.state_change
FROM unnest(%(pids)s::integer[]) AS asked (pid)
LEFT JOIN pg_stat_activity AS backend
    ON backend.pid = asked.pid AND backend.usename = current_user
WHERE backend.state IS DISTINCT FROM 'active' AND pg_backend_pid() = %(own_pid)s;
