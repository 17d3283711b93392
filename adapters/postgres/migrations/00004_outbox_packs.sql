-- Typed messages of a transaction go into one row a shard (outbox.Packs), not into a row each. Rows from before are relayed
-- still. A relay of the version before takes a packed row for one that says nothing and sets it aside: stop it before writers of this version start.

-- +goose Up

-- The relay tells a row that says nothing by itself; a CHECK is parsed anew for each statement.
ALTER TABLE outbox DROP CONSTRAINT outbox_kind;
ALTER TABLE outbox ADD COLUMN pack bytea;
-- Packs are at most half a page, unless one message is larger by itself: never worth compressing or moving out of line.
ALTER TABLE outbox ALTER COLUMN pack SET STORAGE EXTERNAL;
-- +goose StatementBegin
DO $$
DECLARE p regclass;
BEGIN
    FOR p IN SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'outbox'::regclass LOOP
        EXECUTE format('ALTER TABLE %s SET (toast_tuple_target = 8160)', p);
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose Down
-- +goose StatementBegin
DO $$
BEGIN
    IF EXISTS (SELECT FROM outbox AS o JOIN outbox_shards AS s USING (shard) WHERE o.pack IS NOT NULL AND NOT pg_visible_in_snapshot(o.xid, s.prev)) THEN
        RAISE EXCEPTION 'the outbox holds messages that were not relayed, in a form that the version before cannot read'
            USING HINT = 'stop what writes orders, leave a relay running until the backlog is 0, then migrate down';
    END IF;
END $$;
-- +goose StatementEnd
DELETE FROM outbox WHERE pack IS NOT NULL; -- all relayed
ALTER TABLE outbox DROP COLUMN pack;
ALTER TABLE outbox ADD CONSTRAINT outbox_kind CHECK (CASE WHEN type IS NULL THEN topic IS NOT NULL ELSE order_id IS NOT NULL AND topic IS NULL END);
