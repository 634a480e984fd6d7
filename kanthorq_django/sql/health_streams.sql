-- Streams that hold events which no consumer will ever read, such as those of a misspelt name.
SELECT stream.name
FROM kanthorq_django_stream AS stream
WHERE NOT EXISTS (SELECT FROM kanthorq_django_consumer WHERE stream_id = stream.id)
    -- In the order of the index, so that it ends at the first one of millions.
    AND EXISTS (
        SELECT FROM (
            SELECT FROM kanthorq_django_event WHERE stream_id = stream.id ORDER BY xid, id LIMIT 1
        ) AS first
    )
ORDER BY stream.name;
