-- A transaction that has presumed something, instead of reading it, has it verified with its writes: a value that is not true cannot be of this type.
--
-- Rolling upgrade: processes of the schema before do not know it.

-- +goose Up

CREATE DOMAIN presumed AS boolean CHECK (VALUE);

-- +goose Down

DROP DOMAIN presumed;
