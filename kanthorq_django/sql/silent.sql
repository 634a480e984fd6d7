-- Which of these backends, whose clients wait for them, are not at work, and since when? What was
-- sent to them has been lost on the way, or their answer has; null: there is no such backend any
-- more. Behind a pooler the numbers are not those of backends, as our own one tells. Whose state is
-- not shown, to a role that was assumed or without track_activities, may well be at work. By the
-- role that logged in, as pg_stat_activity has it: another's backend has got the number of ours,
-- which is gone. Reads only.
SELECT asked.pid, backend.state_change
FROM unnest(%(pids)s::integer[]) AS asked (pid)
LEFT JOIN pg_stat_activity AS backend
    ON backend.pid = asked.pid AND backend.usename = session_user
WHERE
    (backend.pid IS NULL OR backend.state NOT IN ('active', 'fastpath function call', 'disabled'))
    AND pg_backend_pid() = %(own_pid)s;
