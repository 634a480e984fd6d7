-- First statement of a pull: only one puller reads on behalf of a consumer at a time.
-- No row means that another one is at it. The statement that reads the stream has to come
-- after this one, so that its snapshot is younger than the last puller's commit. It may be sent
-- along: what it may read for is left in a setting that ends with the transaction, and that is
-- empty where the cursor was written by another cluster.
WITH locked AS MATERIALIZED (
    SELECT
        consumer.id,
        consumer.subject_includes,
        consumer.subject_excludes,
        consumer.cluster_id,
        -- Looked up in a file of the server's, once a session: none moves to another cluster.
        coalesce(
            nullif(current_setting('kanthorq.cluster_id', true), ''),
            set_config(
                'kanthorq.cluster_id', (pg_control_system()).system_identifier::text, false
            )
        )::bigint AS current_cluster_id
    FROM kanthorq_django_consumer AS consumer
    WHERE consumer.id = %(consumer_id)s
    FOR NO KEY UPDATE SKIP LOCKED
)
SELECT
    subject_includes::text AS subject_includes,
    subject_excludes::text AS subject_excludes,
    cluster_id = current_cluster_id AS is_ours,
    set_config(
        'kanthorq.locked', CASE WHEN cluster_id = current_cluster_id THEN id::text ELSE '' END, true
    )
FROM locked;
