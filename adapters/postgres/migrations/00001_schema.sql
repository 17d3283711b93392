-- The tables of orders, of stock and of payments; no statement of ours touches two of the three.
-- Times are the database's. Enumerations are text with a CHECK, so that a person reading a row needs no key to it.
-- Text that is compared or sorted is COLLATE "C": bytewise, as the program sorts, and the same on every machine.

-- +goose Up

-- +goose StatementBegin
CREATE FUNCTION ordersaga_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- Retention deletes whole orders that ended long ago, and says so for the one transaction that does.
    IF TG_OP = 'DELETE' AND current_setting('ordersaga.retention', true) = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP USING ERRCODE = '55000';
END $$;
-- +goose StatementEnd

-- ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- What was asked for; it never changes. How it fares (status, reason, the number of public events) is its saga's, and only there: one
-- update less a saga (400 bytes of WAL), and no two places that could disagree.
CREATE TABLE orders (
    id             uuid        PRIMARY KEY,
    customer_id    text        NOT NULL COLLATE "C" CHECK (octet_length(customer_id) <= 128),
    payment_method text        NOT NULL COLLATE "C" CHECK (octet_length(payment_method) <= 128),
    currency       text        NOT NULL COLLATE "C" CHECK (currency ~ '^[A-Z]{3}$'),
    total_minor    bigint      NOT NULL CHECK (total_minor BETWEEN 0 AND 99999999),
    lines          jsonb       NOT NULL CHECK (jsonb_typeof(lines) = 'array'), -- [["sku", quantity, unit price in minor units], …], sorted by SKU
    request_hash   bigint      NOT NULL,                                       -- of what was asked for: is it the same order again?
    created_at     timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX orders_recent ON orders (created_at, id);
CREATE INDEX orders_customer ON orders (customer_id, created_at, id);

-- One row a saga. Updates stay HOT as long as the deadline stands still: it is the only indexed column that ever changes. Orders that were placed
-- together move together, so a page needs room for a second version of all of its rows (at 60: 11 % were not HOT, at 50: 1 %). Running and
-- compensating sagas always have a deadline (F17), so its index is also the list of the sagas under way.
CREATE TABLE sagas (
    order_id     uuid        PRIMARY KEY,
    definition   text        NOT NULL COLLATE "C",
    def_version  smallint    NOT NULL,
    total_minor  bigint      NOT NULL CHECK (total_minor BETWEEN 0 AND 99999999),
    currency     text        NOT NULL COLLATE "C",
    started_at   timestamptz NOT NULL DEFAULT now(),
    deadline     timestamptz,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    version      integer     NOT NULL CHECK (version >= 1),
    sequence     integer     NOT NULL CHECK (sequence >= 1), -- public events of the order so far
    phase        text        NOT NULL COLLATE "C",
    status       text        NOT NULL COLLATE "C", -- of the order
    reason       text        COLLATE "C",
    steps        text        NOT NULL COLLATE "C" CHECK (translate(steps, '-cdr', '') = ''), -- a letter a step: - idle, c commanded, d done, r refused
    undos        text        NOT NULL COLLATE "C" CHECK (translate(undos, '-cd', '') = ''),  -- a letter a participant
    cancel       boolean     NOT NULL DEFAULT false,                                         -- a cancel waits for the pivot's outcome
    ended_at     timestamptz,
    stuck_since  timestamptz,
    stuck_reason text,
    stuck_owner  text,
    CONSTRAINT sagas_status CHECK (CASE status
        WHEN 'pending'   THEN reason IS NULL AND total_minor > 0
        WHEN 'confirmed' THEN reason IS NULL AND total_minor > 0
        WHEN 'rejected'  THEN reason IS NOT NULL AND reason IN ('out_of_stock', 'payment_declined', 'capture_failed', 'timed_out', 'price_changed', 'unknown_product', 'invalid')
        WHEN 'cancelled' THEN reason IS NOT NULL AND reason = 'cancelled_by_customer'
        ELSE false END),
    CONSTRAINT sagas_phase CHECK (CASE phase
        WHEN 'running'      THEN status IN ('pending', 'confirmed') AND deadline IS NOT NULL AND ended_at IS NULL
        WHEN 'compensating' THEN status IN ('rejected', 'cancelled') AND deadline IS NOT NULL AND ended_at IS NULL
        WHEN 'completed'    THEN status = 'confirmed' AND deadline IS NULL AND ended_at IS NOT NULL AND stuck_since IS NULL
        WHEN 'compensated'  THEN status IN ('rejected', 'cancelled') AND deadline IS NULL AND ended_at IS NOT NULL AND stuck_since IS NULL
        ELSE false END),
    CONSTRAINT sagas_cancel CHECK (NOT cancel OR phase = 'running' AND status = 'pending'),
    CONSTRAINT sagas_stuck CHECK ((stuck_since IS NULL) = (stuck_reason IS NULL) AND (stuck_owner IS NULL OR stuck_since IS NOT NULL))
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX sagas_deadline ON sagas (deadline) WHERE deadline IS NOT NULL;

-- What happened to a saga, one row a change.
CREATE TABLE saga_history (
    order_id uuid        NOT NULL,
    version  integer     NOT NULL,
    at       timestamptz NOT NULL DEFAULT now(),
    cause    uuid, -- id of the message; null: a person or the clock
    input    text        NOT NULL COLLATE "C",
    name     text,
    reason   text,
    owner    text,
    phase    text        NOT NULL COLLATE "C",
    status   text        NOT NULL COLLATE "C",
    actor    text,
    PRIMARY KEY (order_id, version)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON saga_history FOR EACH STATEMENT EXECUTE FUNCTION ordersaga_append_only();

-- A step of an order that was seen, or undone before it was seen. No time limit (F14).
CREATE TABLE barriers (
    order_id uuid        NOT NULL,
    step     text        NOT NULL COLLATE "C",
    state    text        NOT NULL COLLATE "C" CHECK (state IN ('started', 'done', 'refused', 'undone', 'tombstone')),
    at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (order_id, step)
);

-- An Idempotency-Key of a caller with the answer to repeat.
CREATE TABLE idempotency_keys (
    id         uuid        PRIMARY KEY, -- the first 16 bytes of SHA-256 of caller, NUL, key
    body       bytea       NOT NULL CHECK (octet_length(body) = 32), -- SHA-256 of the request's raw body
    order_id   uuid        NOT NULL,
    answer     bytea       NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX idempotency_keys_created ON idempotency_keys (created_at);

CREATE TABLE products (
    sku              text        PRIMARY KEY COLLATE "C" CHECK (octet_length(sku) BETWEEN 1 AND 128),
    name             text        NOT NULL,
    unit_price_minor bigint      NOT NULL CHECK (unit_price_minor BETWEEN 0 AND 99999999),
    currency         text        NOT NULL COLLATE "C" CHECK (currency ~ '^[A-Z]{3}$'),
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now()
);

-- ── stock ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- on hand = available + reserved; the CHECKs refuse overselling whatever the program believes (F29). Few rows, written all the time: pages
-- are left mostly empty for HOT updates.
CREATE TABLE stock (
    sku       text   PRIMARY KEY COLLATE "C",
    available bigint NOT NULL CHECK (available >= 0),
    reserved  bigint NOT NULL CHECK (reserved >= 0),
    sold      bigint NOT NULL CHECK (sold >= 0)
) WITH (fillfactor = 25, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

CREATE TABLE stock_adjustments (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sku           text        NOT NULL COLLATE "C",
    delta         bigint      NOT NULL CHECK (delta <> 0),
    on_hand_after bigint      NOT NULL CHECK (on_hand_after >= 0),
    actor         text        NOT NULL,
    note          text        NOT NULL DEFAULT '',
    at            timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX stock_adjustments_sku ON stock_adjustments (sku, id);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON stock_adjustments FOR EACH STATEMENT EXECUTE FUNCTION ordersaga_append_only();

-- An order's claim on stock, and the barrier of the stock steps.
CREATE TABLE reservations (
    order_id uuid   PRIMARY KEY,
    lines    jsonb  NOT NULL CHECK (jsonb_typeof(lines) = 'array'), -- [["sku", quantity], …], sorted by SKU
    short    text   COLLATE "C", -- of a rejected one: the product that was short
    have     bigint CHECK (have >= 0),
    state    text   NOT NULL COLLATE "C",
    CONSTRAINT reservations_state CHECK (CASE state
        WHEN 'reserved'  THEN short IS NULL AND lines <> '[]'
        WHEN 'committed' THEN short IS NULL AND lines <> '[]'
        WHEN 'released'  THEN short IS NULL AND lines <> '[]'
        WHEN 'rejected'  THEN short IS NOT NULL AND have IS NOT NULL
        WHEN 'tombstone' THEN short IS NULL AND lines = '[]'
        ELSE false END)
) WITH (fillfactor = 80);

-- ── payments ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- The barrier of one gateway operation of one order, written as started before the gateway is called (F36).
CREATE TABLE payments (
    order_id     uuid        NOT NULL,
    op           text        NOT NULL COLLATE "C" CHECK (op IN ('authorize', 'capture', 'reverse')),
    amount_minor bigint      NOT NULL CHECK (amount_minor BETWEEN 0 AND 99999999),
    currency     text        NOT NULL COLLATE "C",
    method       text        NOT NULL DEFAULT '' COLLATE "C",
    begun        timestamptz NOT NULL DEFAULT now(), -- past the gateway's memory of keys (Stripe: 24 h) a look-up comes first
    attempt      integer     NOT NULL CHECK (attempt >= 0),
    ref          text        NOT NULL DEFAULT '' COLLATE "C",
    code         text        NOT NULL DEFAULT '',
    state        text        NOT NULL COLLATE "C" CHECK (state IN ('started', 'done', 'refused', 'undone', 'tombstone')),
    PRIMARY KEY (order_id, op),
    CONSTRAINT payments_numbered CHECK (state = 'tombstone' OR attempt >= 1)
) WITH (fillfactor = 70);

-- Dependencies that some process found away, so that deadlines are not held against customers.
CREATE TABLE outages (
    dependency text        PRIMARY KEY COLLATE "C",
    since      timestamptz NOT NULL DEFAULT now(),
    seen_at    timestamptz NOT NULL DEFAULT now()
);

-- ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- What became of a message in a group (F35). Partitions follow the time in a UUIDv7, a day each, made ahead and dropped after a week;
-- ids that are hashes of foreign ones begin with six zero bytes and have a partition of their own; the default one is for
-- ids from before the first or after the last day, and stays next to empty.
CREATE TABLE inbox (
    message_id uuid        NOT NULL,
    grp        text        NOT NULL COLLATE "C",
    state      text        NOT NULL COLLATE "C" CHECK (state IN ('handled', 'waiting', 'parked', 'dead', 'replaying', 'discarded')),
    ticket     bigint      NOT NULL,
    hash       bigint      NOT NULL,
    at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (message_id, grp)
) PARTITION BY RANGE (message_id);
CREATE TABLE inbox_foreign PARTITION OF inbox FOR VALUES FROM (MINVALUE) TO ('00000000-0001-0000-0000-000000000000');
CREATE TABLE inbox_default PARTITION OF inbox DEFAULT;
CREATE INDEX inbox_foreign_at ON inbox_foreign (at);
CREATE INDEX inbox_default_at ON inbox_default (at);

-- A record that a person has to decide about. Raw bytes are kept whatever the broker's limits.
CREATE TABLE dead_letters (
    id           uuid        PRIMARY KEY,
    grp          text        NOT NULL COLLATE "C",
    message_id   uuid        NOT NULL,
    topic        text        NOT NULL COLLATE "C",
    partition_no integer     NOT NULL,
    offset_no    bigint      NOT NULL,
    type         text        NOT NULL COLLATE "C",
    order_id     uuid,
    class        text        NOT NULL COLLATE "C",
    error        text        NOT NULL,
    fingerprint  text        NOT NULL COLLATE "C",
    first_failed timestamptz NOT NULL,
    key          bytea       NOT NULL,
    value        bytea       NOT NULL,
    headers      bytea       NOT NULL, -- events.AppendHeaders
    attempts     integer     NOT NULL CHECK (attempts >= 0),
    last_failed  timestamptz NOT NULL,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    ticket       bigint      NOT NULL DEFAULT 0,
    status       text        NOT NULL COLLATE "C" CHECK (status IN ('open', 'replaying', 'resolved', 'discarded', 'superseded')),
    owner        text        NOT NULL DEFAULT '',
    note         text        NOT NULL DEFAULT '',
    UNIQUE (grp, message_id)
);
CREATE INDEX dead_letters_status ON dead_letters (status, id);
CREATE INDEX dead_letters_order ON dead_letters (order_id) WHERE order_id IS NOT NULL;
CREATE INDEX dead_letters_fingerprint ON dead_letters (fingerprint, id);

-- A replay or discard by an operator: the selection is frozen when it begins, so that it survives the process (F16).
CREATE TABLE operations (
    id          uuid        PRIMARY KEY,
    action      text        NOT NULL COLLATE "C" CHECK (action IN ('replay', 'discard')),
    actor       text        NOT NULL CHECK (actor <> ''),
    note        text        NOT NULL DEFAULT '',
    items       integer     NOT NULL CHECK (items >= 0),
    created_at  timestamptz NOT NULL DEFAULT now(),
    touched_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
);
CREATE INDEX operations_open ON operations (touched_at) WHERE finished_at IS NULL;
CREATE TABLE operation_items (
    operation_id   uuid        NOT NULL REFERENCES operations ON DELETE CASCADE,
    position       integer     NOT NULL,
    dead_letter_id uuid        NOT NULL, -- as it was asked for: it need not exist
    outcome        text        COLLATE "C",
    error          text,
    at             timestamptz,
    PRIMARY KEY (operation_id, position),
    CONSTRAINT operation_items_result CHECK ((at IS NULL) = (outcome IS NULL) AND (at IS NULL) = (error IS NULL))
);
CREATE INDEX operation_items_letter ON operation_items (operation_id, dead_letter_id);
CREATE INDEX operation_items_pending ON operation_items (operation_id, position) WHERE at IS NULL;

-- What people did.
CREATE TABLE audit_log (
    id     bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     timestamptz NOT NULL DEFAULT now(),
    actor  text        NOT NULL CHECK (actor <> ''),
    action text        NOT NULL COLLATE "C" CHECK (action <> ''),
    target text        NOT NULL,
    note   text        NOT NULL DEFAULT '',
    detail jsonb
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log FOR EACH STATEMENT EXECUTE FUNCTION ordersaga_append_only();

-- +goose Down
DROP TABLE audit_log, operation_items, operations, dead_letters, inbox, outages, payments, reservations, stock_adjustments, stock, products, idempotency_keys, barriers,
    saga_history, sagas, orders;
DROP FUNCTION ordersaga_append_only();
