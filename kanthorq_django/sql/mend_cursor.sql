-- Let transactions that are open be unread, wherever a cursor says that they have ended: a server
-- may forget a prepared transaction in one recovery and find it in the next. Nothing of an open
-- transaction has ever been read, so this is right whatever happened. Returns their ids.
WITH reopened AS (
    SELECT open.xid
    FROM kanthorq_django_consumer AS consumer,
        pg_snapshot_xip(pg_current_snapshot()) AS open (xid)
    WHERE consumer.id = %(consumer_id)s
        AND consumer.cluster_id = (SELECT system_identifier FROM pg_control_system())
        AND pg_snapshot_xmax(consumer."cursor") <= pg_snapshot_xmax(pg_current_snapshot())
        AND (
            pg_visible_in_snapshot(open.xid, consumer."cursor")
            OR pg_visible_in_snapshot(open.xid, consumer."window")
        )
),
mended AS (
    UPDATE kanthorq_django_consumer AS consumer
    SET "cursor" = coalesce(known."cursor", consumer."cursor"), "window" = coalesce(known."window", consumer."window")
    FROM (
        SELECT
            id,
            (
                SELECT format('%%s:%%s:%%s', min(xid), pg_snapshot_xmax("cursor"), string_agg(xid::text, ',' ORDER BY xid))
                FROM (
                    SELECT pg_snapshot_xip("cursor")
                    UNION SELECT xid FROM reopened WHERE pg_visible_in_snapshot(xid, "cursor")
                ) AS open (xid)
                HAVING count(*) > 0
            )::pg_snapshot AS "cursor",
            (
                SELECT format('%%s:%%s:%%s', min(xid), pg_snapshot_xmax("window"), string_agg(xid::text, ',' ORDER BY xid))
                FROM (
                    SELECT pg_snapshot_xip("window")
                    UNION SELECT xid FROM reopened WHERE pg_visible_in_snapshot(xid, "window")
                ) AS open (xid)
                HAVING count(*) > 0
            )::pg_snapshot AS "window"
        FROM kanthorq_django_consumer
        WHERE id = %(consumer_id)s
    ) AS known
    WHERE consumer.id = known.id AND EXISTS (SELECT FROM reopened)
)
SELECT xid::text::bigint AS xid FROM reopened ORDER BY xid;
