-- What a COPY cannot return: the transaction and the time that its rows get.
SELECT
    %(stream_id)s::bigint AS stream_id,
    pg_current_xact_id()::text::bigint AS xid,
    (extract(epoch FROM statement_timestamp()) * 1000000)::bigint AS microseconds;
