-- Wake the workers of a stream, unless the event was not inserted after all: its key was known.
-- None listens to a stream that is not registered yet.
SELECT pg_notify(%(channel)s || id, '')
FROM kanthorq_django_stream
WHERE name = %(stream)s AND EXISTS (SELECT FROM kanthorq_django_event WHERE id = %(id)s);
