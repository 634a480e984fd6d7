-- Which of these backends are not at work although their clients wait for them, and since when? What
-- was sent to them was lost on the way, or their answer was. A null says that the backend is gone.
-- No row behind a pooler, whose process ids are not those of backends: our own one tells. Nor for a
-- backend whose state is hidden, from an assumed role or without track_activities, as it may be at
-- work. Compared by the role that logged in, as in pg_stat_activity: a backend of another role has
-- got the number of one of ours, which is gone. Reads only.
SELECT asked.pid, backend.state_change
FROM unnest(%(pids)s::integer[]) AS asked (pid)
LEFT JOIN pg_stat_activity AS backend
    ON backend.pid = asked.pid AND backend.usename = session_user
WHERE
    (backend.pid IS NULL OR backend.state NOT IN ('active', 'fastpath function call', 'disabled'))
    AND pg_backend_pid() = %(own_pid)s;
