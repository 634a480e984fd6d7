-- Restored events whose transaction ids this cluster has not come to yet would turn up as new
-- once it does: give them the first id of all, which every cursor has read.
WITH rewritten AS (
    UPDATE kanthorq_django_event
    SET xid = '3'
    WHERE xid >= pg_snapshot_xmin(%(snapshot)s::pg_snapshot)
        AND NOT pg_visible_in_snapshot(xid, %(snapshot)s::pg_snapshot)
        AND xid <> pg_current_xact_id()  -- published just now, by a trigger on tasks
    RETURNING id
)
SELECT count(*) AS event_count FROM rewritten;
