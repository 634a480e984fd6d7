-- What grows without a bound if nobody looks: dead rows of our tables that vacuum has not
-- removed, as of the last statistics, and the oldest forgotten prepared transaction, which keeps
-- vacuum from all of them. Reads statistics only; needs no special role.
SELECT
    prepared.gid AS prepared_gid,
    statement_timestamp() - prepared.prepared AS prepared_age,
    coalesce(
        (
            SELECT jsonb_object_agg(relname, jsonb_build_array(n_dead_tup, n_live_tup))
            FROM pg_stat_user_tables
            WHERE relname LIKE 'kanthorq\_django\_%%'
                AND pg_table_is_visible(relid)
                AND n_dead_tup > %(dead_min)s
        ),
        '{}'
    )::text AS dead_rows
FROM (SELECT) AS always
LEFT JOIN LATERAL (
    SELECT gid, prepared FROM pg_prepared_xacts
    WHERE database = current_database()
    ORDER BY prepared
    LIMIT 1
) AS prepared ON true;
