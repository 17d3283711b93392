-- What a row may hold is checked by its types. Postgres parses every CHECK of a table anew for each statement that writes to it (with a batch of one
-- that was half of what the statement cost), but a domain's once a session. What concerns several columns stays a CHECK, one a table.
--
-- Lines are json: they are read and written whole, and as text take half of the room.
--
-- An update stays on its page (HOT) only if the page has room for a second version of all the rows that were inserted together.
--
-- Rolling upgrade: processes of the schema before go on working, but for their `audit` of stock, which takes lines for jsonb. Most tables are
-- rewritten under an exclusive lock, though, some fifteen seconds a million orders: orders wait for that long.

-- +goose Up

CREATE DOMAIN short_text AS text COLLATE "C" CHECK (octet_length(VALUE) <= 128);
CREATE DOMAIN currency_code AS text COLLATE "C" CHECK (VALUE ~ '^[A-Z]{3}$');
CREATE DOMAIN amount_minor AS bigint CHECK (VALUE BETWEEN 0 AND 99999999);
CREATE DOMAIN pieces AS bigint CHECK (VALUE >= 0);
CREATE DOMAIN positive AS integer CHECK (VALUE >= 1);
CREATE DOMAIN order_lines AS json CHECK (json_typeof(VALUE) = 'array');
CREATE DOMAIN sha256_hash AS bytea CHECK (octet_length(VALUE) = 32);
CREATE DOMAIN saga_phase AS text COLLATE "C" CHECK (VALUE IN ('running', 'compensating', 'completed', 'compensated'));
CREATE DOMAIN order_status AS text COLLATE "C" CHECK (VALUE IN ('pending', 'confirmed', 'rejected', 'cancelled'));
CREATE DOMAIN order_reason AS text COLLATE "C" CHECK (VALUE IN ('out_of_stock', 'payment_declined', 'capture_failed', 'timed_out', 'price_changed',
    'unknown_product', 'invalid', 'cancelled_by_customer'));
CREATE DOMAIN step_letters AS text COLLATE "C" CHECK (btrim(VALUE, '-cdr') = ''); -- a letter a step: - idle, c commanded, d done, r refused
CREATE DOMAIN undo_letters AS text COLLATE "C" CHECK (btrim(VALUE, '-cd') = '');  -- a letter a participant
CREATE DOMAIN payment_op AS text COLLATE "C" CHECK (VALUE IN ('authorize', 'capture', 'reverse'));
CREATE DOMAIN barrier_state AS text COLLATE "C" CHECK (VALUE IN ('started', 'done', 'refused', 'undone', 'tombstone'));
CREATE DOMAIN reservation_state AS text COLLATE "C" CHECK (VALUE IN ('reserved', 'committed', 'released', 'rejected', 'tombstone'));
CREATE DOMAIN inbox_state AS text COLLATE "C" CHECK (VALUE IN ('handled', 'waiting', 'parked', 'dead', 'replaying', 'discarded'));

ALTER TABLE orders
    DROP CONSTRAINT orders_customer_id_check, DROP CONSTRAINT orders_payment_method_check, DROP CONSTRAINT orders_currency_check,
    DROP CONSTRAINT orders_total_minor_check, DROP CONSTRAINT orders_lines_check,
    ALTER customer_id TYPE short_text, ALTER payment_method TYPE short_text, ALTER currency TYPE currency_code, ALTER total_minor TYPE amount_minor,
    ALTER lines TYPE order_lines USING lines::json;

-- The order has amount and currency checked, and they never change.
ALTER TABLE sagas
    DROP CONSTRAINT sagas_total_minor_check, DROP CONSTRAINT sagas_version_check, DROP CONSTRAINT sagas_sequence_check, DROP CONSTRAINT sagas_steps_check,
    DROP CONSTRAINT sagas_undos_check, DROP CONSTRAINT sagas_status, DROP CONSTRAINT sagas_phase, DROP CONSTRAINT sagas_cancel, DROP CONSTRAINT sagas_stuck,
    ALTER version TYPE positive, ALTER sequence TYPE positive, ALTER phase TYPE saga_phase, ALTER status TYPE order_status, ALTER reason TYPE order_reason,
    ALTER steps TYPE step_letters, ALTER undos TYPE undo_letters,
    ADD CONSTRAINT sagas_state CHECK (
        (deadline IS NULL) = (phase IN ('completed', 'compensated')) AND (deadline IS NULL) = (ended_at IS NOT NULL)
        AND (reason IS NULL) = (phase IN ('running', 'completed')) AND (reason IS NULL) = (status IN ('pending', 'confirmed'))
        AND (status = 'cancelled') = (reason IS NOT DISTINCT FROM 'cancelled_by_customer')
        AND (status <> 'pending' OR phase = 'running') AND (total_minor > 0 OR reason IS NOT NULL) AND (NOT cancel OR status = 'pending')
        AND (stuck_since IS NULL) = (stuck_reason IS NULL) AND (stuck_since IS NULL OR deadline IS NOT NULL) AND (stuck_owner IS NULL OR stuck_since IS NOT NULL));

ALTER TABLE stock
    DROP CONSTRAINT stock_available_check, DROP CONSTRAINT stock_reserved_check, DROP CONSTRAINT stock_sold_check,
    ALTER available TYPE pieces, ALTER reserved TYPE pieces, ALTER sold TYPE pieces;

ALTER TABLE reservations
    DROP CONSTRAINT reservations_lines_check, DROP CONSTRAINT reservations_have_check, DROP CONSTRAINT reservations_state,
    ALTER lines TYPE order_lines USING lines::json, ALTER have TYPE pieces, ALTER state TYPE reservation_state,
    ADD CONSTRAINT reservations_state CHECK ((state = 'rejected') = (short IS NOT NULL) AND (short IS NULL) = (have IS NULL)
        AND (state = 'tombstone') = (lines::text = '[]')),
    SET (fillfactor = 50);

ALTER TABLE payments
    DROP CONSTRAINT payments_op_check, DROP CONSTRAINT payments_amount_minor_check, DROP CONSTRAINT payments_attempt_check, DROP CONSTRAINT payments_state_check,
    ALTER op TYPE payment_op, ALTER amount_minor TYPE amount_minor, ALTER state TYPE barrier_state,
    SET (fillfactor = 50);

ALTER TABLE barriers DROP CONSTRAINT barriers_state_check, ALTER state TYPE barrier_state;
ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_body_check, ALTER body TYPE sha256_hash;
ALTER TABLE inbox DROP CONSTRAINT inbox_state_check, ALTER state TYPE inbox_state;

-- +goose Down

ALTER TABLE inbox ALTER state TYPE text COLLATE "C",
    ADD CHECK (state IN ('handled', 'waiting', 'parked', 'dead', 'replaying', 'discarded'));
ALTER TABLE idempotency_keys ALTER body TYPE bytea, ADD CHECK (octet_length(body) = 32);
ALTER TABLE barriers ALTER state TYPE text COLLATE "C", ADD CHECK (state IN ('started', 'done', 'refused', 'undone', 'tombstone'));
ALTER TABLE payments
    ALTER op TYPE text COLLATE "C", ALTER amount_minor TYPE bigint, ALTER state TYPE text COLLATE "C",
    ADD CHECK (op IN ('authorize', 'capture', 'reverse')), ADD CHECK (amount_minor BETWEEN 0 AND 99999999), ADD CHECK (attempt >= 0),
    ADD CHECK (state IN ('started', 'done', 'refused', 'undone', 'tombstone')),
    SET (fillfactor = 70);
ALTER TABLE reservations
    DROP CONSTRAINT reservations_state,
    ALTER lines TYPE jsonb USING lines::jsonb, ALTER have TYPE bigint, ALTER state TYPE text COLLATE "C",
    ADD CHECK (jsonb_typeof(lines) = 'array'), ADD CHECK (have >= 0),
    ADD CONSTRAINT reservations_state CHECK (CASE state
        WHEN 'reserved'  THEN short IS NULL AND lines <> '[]'
        WHEN 'committed' THEN short IS NULL AND lines <> '[]'
        WHEN 'released'  THEN short IS NULL AND lines <> '[]'
        WHEN 'rejected'  THEN short IS NOT NULL AND have IS NOT NULL
        WHEN 'tombstone' THEN short IS NULL AND lines = '[]'
        ELSE false END),
    SET (fillfactor = 80);
ALTER TABLE stock
    ALTER available TYPE bigint, ALTER reserved TYPE bigint, ALTER sold TYPE bigint,
    ADD CHECK (available >= 0), ADD CHECK (reserved >= 0), ADD CHECK (sold >= 0);
ALTER TABLE sagas
    DROP CONSTRAINT sagas_state,
    ALTER version TYPE integer, ALTER sequence TYPE integer, ALTER phase TYPE text COLLATE "C", ALTER status TYPE text COLLATE "C",
    ALTER reason TYPE text COLLATE "C", ALTER steps TYPE text COLLATE "C", ALTER undos TYPE text COLLATE "C",
    ADD CHECK (total_minor BETWEEN 0 AND 99999999), ADD CHECK (version >= 1), ADD CHECK (sequence >= 1),
    ADD CHECK (translate(steps, '-cdr', '') = ''), ADD CHECK (translate(undos, '-cd', '') = ''),
    ADD CONSTRAINT sagas_status CHECK (CASE status
        WHEN 'pending'   THEN reason IS NULL AND total_minor > 0
        WHEN 'confirmed' THEN reason IS NULL AND total_minor > 0
        WHEN 'rejected'  THEN reason IS NOT NULL AND reason IN ('out_of_stock', 'payment_declined', 'capture_failed', 'timed_out', 'price_changed', 'unknown_product', 'invalid')
        WHEN 'cancelled' THEN reason IS NOT NULL AND reason = 'cancelled_by_customer'
        ELSE false END),
    ADD CONSTRAINT sagas_phase CHECK (CASE phase
        WHEN 'running'      THEN status IN ('pending', 'confirmed') AND deadline IS NOT NULL AND ended_at IS NULL
        WHEN 'compensating' THEN status IN ('rejected', 'cancelled') AND deadline IS NOT NULL AND ended_at IS NULL
        WHEN 'completed'    THEN status = 'confirmed' AND deadline IS NULL AND ended_at IS NOT NULL AND stuck_since IS NULL
        WHEN 'compensated'  THEN status IN ('rejected', 'cancelled') AND deadline IS NULL AND ended_at IS NOT NULL AND stuck_since IS NULL
        ELSE false END),
    ADD CONSTRAINT sagas_cancel CHECK (NOT cancel OR phase = 'running' AND status = 'pending'),
    ADD CONSTRAINT sagas_stuck CHECK ((stuck_since IS NULL) = (stuck_reason IS NULL) AND (stuck_owner IS NULL OR stuck_since IS NOT NULL));
ALTER TABLE orders
    ALTER customer_id TYPE text COLLATE "C", ALTER payment_method TYPE text COLLATE "C", ALTER currency TYPE text COLLATE "C",
    ALTER total_minor TYPE bigint, ALTER lines TYPE jsonb USING lines::jsonb,
    ADD CHECK (octet_length(customer_id) <= 128), ADD CHECK (octet_length(payment_method) <= 128), ADD CHECK (currency ~ '^[A-Z]{3}$'),
    ADD CHECK (total_minor BETWEEN 0 AND 99999999), ADD CHECK (jsonb_typeof(lines) = 'array');
DROP DOMAIN short_text, currency_code, amount_minor, pieces, positive, order_lines, sha256_hash, saga_phase, order_status, order_reason, step_letters, undo_letters,
    payment_op, barrier_state, reservation_state, inbox_state;
