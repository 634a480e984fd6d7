-- Wake who listens to a channel.
SELECT pg_notify(%(channel)s, '');
