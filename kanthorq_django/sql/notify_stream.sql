-- Wake the workers of a stream; none listens to one that is not registered yet.
SELECT pg_notify(%(channel)s || id, '') FROM kanthorq_django_stream WHERE name = %(stream)s;
