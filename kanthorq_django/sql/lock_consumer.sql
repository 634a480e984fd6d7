-- First statement of a pull: only one puller reads on behalf of a consumer at a time.
-- No row means that another one is at it. The statement that reads the stream has to come
-- after this one, so that its snapshot is younger than the last puller's commit.
SELECT
    consumer.stream_id,
    consumer."cursor"::text AS "cursor",
    consumer."window"::text AS "window",
    coalesce(consumer.position_xid, '0')::text AS position_xid,
    coalesce(consumer.position_id, '00000000-0000-0000-0000-000000000000') AS position_id,
    consumer.subject_includes::text AS subject_includes,
    consumer.subject_excludes::text AS subject_excludes,
    consumer.cluster_id,
    (pg_control_system()).system_identifier AS current_cluster_id
FROM kanthorq_django_consumer AS consumer
WHERE consumer.id = %(consumer_id)s
FOR NO KEY UPDATE SKIP LOCKED;
