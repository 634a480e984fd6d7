-- How many rows a table holds, about, without reading it: as dense as the last VACUUM or ANALYZE
-- found it, times the pages that it has now. No row when neither has run yet.
SELECT (reltuples / relpages * (pg_relation_size(oid) / current_setting('block_size')::integer))::bigint
    AS count
FROM pg_class
WHERE oid = %(table)s::regclass AND relpages > 0 AND reltuples >= 0;
