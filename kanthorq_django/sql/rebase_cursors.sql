-- Let the rebased consumers go on from now, in this cluster. Returns their common cursor.
WITH latest AS (
    -- A snapshot leaves out the caller's own transaction: add it back, as the pull does.
    SELECT CASE WHEN pg_visible_in_snapshot(pg_current_xact_id(), snapshot) THEN
            format(
                '%%s:%%s:%%s', pg_snapshot_xmin(snapshot), pg_snapshot_xmax(snapshot),
                (SELECT string_agg(xid::text, ',' ORDER BY xid)
                 FROM (SELECT pg_snapshot_xip(snapshot) UNION SELECT pg_current_xact_id()) AS open (xid))
            )::pg_snapshot
        ELSE snapshot END AS snapshot
    FROM pg_current_snapshot() AS snapshot
),
rebased AS (
    UPDATE kanthorq_django_consumer AS consumer
    SET
        "cursor" = latest.snapshot,
        "window" = NULL,
        position_xid = NULL,
        position_id = NULL,
        cluster_id = (pg_control_system()).system_identifier
    FROM latest
    WHERE consumer.id = ANY(%(consumer_ids)s::bigint[])
)
SELECT snapshot::text AS snapshot FROM latest;
