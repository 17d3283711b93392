package postgres

import "context"

// RetireRelays ends the leases of relays that had this name, and forgets them, for a process that starts again under a name that nobody
// else has (a static instance): it need not wait for the leases of its own predecessor to expire. A predecessor that was only paused
// wakes to a fence that has grown, and what it repeats are duplicates.
func (db *DB) RetireRelays(ctx context.Context, name string) error {
	// outbox.New puts a slash and eight characters behind the name.
	if _, err := db.exec(ctx, Operators, "retire relays' leases", `UPDATE outbox_shards SET lease_until = clock_timestamp() WHERE left(owner, -9) = $1`, name); err != nil {
		return err
	}
	_, err := db.exec(ctx, Operators, "retire relays", `DELETE FROM outbox_relays WHERE left(id, -9) = $1`, name)
	return err
}
