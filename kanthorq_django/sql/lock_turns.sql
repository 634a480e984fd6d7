-- First statement of a claim by turns: only one worker gives those of a consumer at a time. No row
-- means that another one is at it. Who looks for turns has to look after this, as in lock_consumer.
SELECT consumer.id
FROM kanthorq_django_consumer AS consumer
WHERE consumer.id = %(consumer_id)s
FOR NO KEY UPDATE SKIP LOCKED;
