-- Every stream with the number of its events, which the index alone can count, and the ages of
-- the first and the last of them, by their transactions; and the number of its consumers. Times that
-- Python cannot hold are told as the nearest that it can, as in pull.sql.
SELECT
    stream.id,
    stream.name,
    coalesce(events.count, 0) AS event_count,
    (
        SELECT count(*) FROM kanthorq_django_consumer WHERE stream_id = stream.id
    ) AS consumer_count,
    statement_timestamp() - first.created_at AS oldest,
    statement_timestamp() - last.created_at AS newest
FROM kanthorq_django_stream AS stream
LEFT JOIN (
    SELECT stream_id, count(*) FROM kanthorq_django_event GROUP BY stream_id
) AS events ON events.stream_id = stream.id
LEFT JOIN LATERAL (
    SELECT least(greatest(created_at, '0002-01-01 00:00Z'), '9998-12-31 23:59:59.999999Z') AS created_at
    FROM kanthorq_django_event
    WHERE stream_id = stream.id ORDER BY xid, id LIMIT 1
) AS first ON true
LEFT JOIN LATERAL (
    SELECT least(greatest(created_at, '0002-01-01 00:00Z'), '9998-12-31 23:59:59.999999Z') AS created_at
    FROM kanthorq_django_event
    WHERE stream_id = stream.id ORDER BY xid DESC, id DESC LIMIT 1
) AS last ON true
ORDER BY stream.name;
