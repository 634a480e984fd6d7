-- First statement of a prune: no consumer can join the stream until this transaction is over,
-- because its foreign key has to lock the same row. Publishers are not held up. What reads the
-- cursors has to come after this, so that it sees a consumer that has just been committed.
SELECT id FROM kanthorq_django_stream WHERE id = %(stream_id)s FOR UPDATE;
