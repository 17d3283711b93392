-- What transactions leave for Kafka. Rows are inserted and, with their partition, dropped: never updated, never deleted.

-- +goose Up

-- xid, the id of the transaction that wrote a row, is what the relay's cursors compare with: see outbox_log.go. A typed message has type, order_id
-- and, if it is traced, trace; its topic, key and headers follow from those. A raw one (a retry copy, a dead letter) has topic, key and headers.
-- The identity's sequence must not cache: ids drawn ahead would put an order's records out of order.
CREATE TABLE outbox (
    id         bigint   GENERATED ALWAYS AS IDENTITY,
    xid        xid8     NOT NULL DEFAULT pg_current_xact_id(),
    sequence   integer,
    shard      smallint NOT NULL,
    message_id uuid     NOT NULL, -- UUIDv7: its time is when the row was made
    order_id   uuid,
    type       text     COLLATE "C",
    trace      bytea,
    topic      text     COLLATE "C",
    key        bytea,
    headers    bytea,
    payload    bytea,
    CONSTRAINT outbox_kind CHECK (CASE WHEN type IS NULL THEN topic IS NOT NULL ELSE order_id IS NOT NULL AND topic IS NULL END)
) PARTITION BY RANGE (xid);
-- xid first: the rows that a cursor has not seen lie together at its end, whatever the size of the table.
CREATE INDEX outbox_xid ON outbox (xid, shard);

-- The first partition; MaintainOutbox and, where it is late, the writers make those that follow. They are too short-lived to be vacuumed.
-- +goose StatementBegin
DO $$
DECLARE
    span   constant numeric := 1000000; -- transactions
    lower  numeric := pg_snapshot_xmin(pg_current_snapshot())::text::numeric;
BEGIN
    lower := lower - lower % span;
    EXECUTE format('CREATE TABLE %I PARTITION OF outbox FOR VALUES FROM (%L) TO (%L) WITH (autovacuum_enabled = false)', 'outbox_p' || lower, lower, lower + span);
END $$;
-- +goose StatementEnd

-- One row a shard of outbox.TotalShards: its lease and its cursor. Updated several times a second: pages are left mostly empty for HOT updates.
CREATE TABLE outbox_shards (
    shard       smallint    PRIMARY KEY,
    owner       text        COLLATE "C",
    fence       bigint      NOT NULL DEFAULT 0, -- grows with every change of owner
    lease_until timestamptz,
    prev        pg_snapshot NOT NULL,
    next        pg_snapshot,
    after_id    bigint      NOT NULL DEFAULT 0,
    -- Where the cursor's transaction ids are from: a dump that is restored elsewhere brings ids that mean nothing there (AdoptOutbox).
    system_id   bigint      NOT NULL DEFAULT (pg_control_system()).system_identifier,
    database_id bigint      NOT NULL,
    CONSTRAINT outbox_shards_lease CHECK ((owner IS NULL) = (lease_until IS NULL)),
    CONSTRAINT outbox_shards_window CHECK (next IS NOT NULL OR after_id = 0)
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
INSERT INTO outbox_shards (shard, prev, database_id)
SELECT g, pg_current_snapshot(), (SELECT oid::bigint FROM pg_database WHERE datname = current_database()) FROM generate_series(0, 17) AS g;

-- The relays that are alive, for their fair shares.
CREATE TABLE outbox_relays (
    id      text        PRIMARY KEY COLLATE "C",
    seen_at timestamptz NOT NULL
) WITH (fillfactor = 20);

-- +goose Down
DROP TABLE outbox_relays;
DROP TABLE outbox_shards;
DROP TABLE outbox;
