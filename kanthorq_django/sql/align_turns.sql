-- Let the open tasks of a consumer follow its column "serialize", which was changed: with it switched
-- off, tasks that wait for a turn would never be claimed. They are locked in id order, as by verbs, so
-- that neither deadlocks with the other. Returns how many there were.
WITH astray AS MATERIALIZED (
    SELECT task.id, rule.turn_key
    FROM kanthorq_django_consumer AS consumer
    JOIN kanthorq_django_task AS task ON task.consumer_id = consumer.id,
        LATERAL (SELECT CASE WHEN consumer.serialize <> '' AND task.resource_key <> ''
            THEN task.resource_key END) AS rule (turn_key)
    WHERE consumer.id = %(consumer_id)s
        AND task.state NOT IN (101, -101, -102)
        AND task.turn_key IS DISTINCT FROM rule.turn_key
    ORDER BY task.id
    FOR NO KEY UPDATE OF task
),
aligned AS (
    UPDATE kanthorq_django_task AS task
    SET turn_key = astray.turn_key
    FROM astray
    WHERE task.id = astray.id
    RETURNING task.id
)
SELECT count(*) AS count FROM aligned;
