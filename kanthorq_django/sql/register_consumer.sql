-- Insert a consumer, or apply what its code changed, from then on; an unchanged row is not
-- written. A consumer that starts "new" begins at a snapshot of now, with the caller's own
-- transaction added, as in pull.sql.
INSERT INTO kanthorq_django_consumer AS consumer (
    stream_id, name, subject_includes, subject_excludes, attempt_max, visibility_timeout,
    timeout, parked, deliver_from, has_cancel_handler, cancel_attempt_max, serialize, "cursor"
)
SELECT
    %(stream_id)s, %(name)s, %(subject_includes)s::jsonb, %(subject_excludes)s::jsonb,
    %(attempt_max)s, %(visibility_timeout)s::interval, %(timeout)s::interval, %(parked)s,
    %(deliver_from)s::timestamptz, %(has_cancel_handler)s, %(cancel_attempt_max)s, %(serialize)s,
    CASE
        WHEN NOT %(from_now)s THEN '1:1:'::pg_snapshot
        WHEN pg_visible_in_snapshot(pg_current_xact_id(), latest) THEN
            format(
                '%%s:%%s:%%s', pg_snapshot_xmin(latest), pg_snapshot_xmax(latest),
                (SELECT string_agg(xid::text, ',' ORDER BY xid)
                 FROM (SELECT pg_snapshot_xip(latest) UNION SELECT pg_current_xact_id()) AS open (xid))
            )::pg_snapshot
        ELSE latest
    END
FROM pg_current_snapshot() AS latest
-- On a conflict the row is locked even if nothing is to be changed, and a worker could not
-- start while somebody else reads, or holds, the row.
WHERE NOT EXISTS (
    SELECT FROM kanthorq_django_consumer AS known
    WHERE known.name = %(name)s AND (
        known.stream_id, known.subject_includes, known.subject_excludes,
        known.attempt_max, known.visibility_timeout, known.timeout, known.parked,
        known.has_cancel_handler, known.cancel_attempt_max, known.serialize
    ) IS NOT DISTINCT FROM (
        %(stream_id)s, %(subject_includes)s::jsonb, %(subject_excludes)s::jsonb,
        %(attempt_max)s, %(visibility_timeout)s::interval, %(timeout)s::interval, %(parked)s,
        %(has_cancel_handler)s, %(cancel_attempt_max)s, %(serialize)s
    )
)
ON CONFLICT (name) DO UPDATE
SET
    subject_includes = excluded.subject_includes,
    subject_excludes = excluded.subject_excludes,
    attempt_max = excluded.attempt_max,
    visibility_timeout = excluded.visibility_timeout,
    timeout = excluded.timeout,
    parked = excluded.parked,
    has_cancel_handler = excluded.has_cancel_handler,
    cancel_attempt_max = excluded.cancel_attempt_max,
    serialize = excluded.serialize
WHERE consumer.stream_id = excluded.stream_id AND (
    consumer.subject_includes, consumer.subject_excludes, consumer.attempt_max,
    consumer.visibility_timeout, consumer.timeout, consumer.parked,
    consumer.has_cancel_handler, consumer.cancel_attempt_max, consumer.serialize
) IS DISTINCT FROM (
    excluded.subject_includes, excluded.subject_excludes, excluded.attempt_max,
    excluded.visibility_timeout, excluded.timeout, excluded.parked,
    excluded.has_cancel_handler, excluded.cancel_attempt_max, excluded.serialize
)
RETURNING id, xmax = 0 AS is_new;
