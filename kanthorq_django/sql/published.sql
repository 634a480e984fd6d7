-- What publish.sql would have returned for an event that is stored.
SELECT stream_id, xid::text::bigint, (extract(epoch FROM created_at) * 1000000)::bigint
FROM kanthorq_django_event
WHERE id = %(id)s;
