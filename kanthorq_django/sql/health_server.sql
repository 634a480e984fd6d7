-- What the server says about itself; needs none of KanthorQ's tables and no special role. Of
-- other users' sessions a plain user sees no start, so they are left out of its oldest.
SELECT
    current_setting('server_version') AS version_name,
    current_setting('server_version_num')::int / 10000 AS version,
    pg_is_in_recovery() AS is_standby,
    CASE WHEN pg_is_in_recovery() THEN 0 ELSE pg_notification_queue_usage() END AS queue_usage,
    pg_has_role('pg_read_all_stats', 'USAGE') AS sees_all_sessions,
    statement_timestamp() - least(
        (
            SELECT min(xact_start) FROM pg_stat_activity
            WHERE datname = current_database()
                AND backend_type = 'client backend'
                AND pid <> pg_backend_pid()
        ),
        (SELECT min(prepared) FROM pg_prepared_xacts WHERE database = current_database())
    ) AS oldest_transaction;
