// Package embedded is what `ordersaga dev` and the tests run on when nobody gives them a Kafka and a Postgres: a broker inside this process
// with its data on disk (Broker), a private PostgreSQL server (Postgres), and the lock of their data directory (Lock).
//
// # Promises
//
//   - What a producer or a committing consumer was told is kept survives kill -9 of this process; with SyncWrites also loss of power. A
//     persistent Postgres runs with fsync on and recovers by itself after kill -9 of its own or of this process.
//   - Two processes never work on one data directory: the second start fails with *AlreadyRunningError, which says who has it.
//   - Nothing started here outlives this process for long: on Linux the kernel ends Postgres with its parent, even after kill -9;
//     elsewhere the next start on the same data ends the orphan before it goes on.
//   - Everything listens on 127.0.0.1 only. Postgres has no Unix socket (so no limit on its path's length, and nothing in /tmp) and asks
//     for a generated password, kept in a file that only the owner can read: loopback is open to every user of a machine.
//   - Every Close and Stop returns soon after its context is done, having stopped by force what did not stop in order.
//
// # What it is not
//
// The broker is for trial, development and tests. It has one node, no replication and no Kafka transactions across a crash, and it is kinder
// than Kafka with bad topic names and configs: every flow is tested against a real Kafka too. Callers create the topics through the admin API,
// with TopicDefaults among their configs. See Broker.Check for the failures that only look like silence.
//
// # When it fails
//
// An error says what to do about it: install PostgreSQL, choose another directory or port, set ORDERSAGA_DATABASE_URL. Postgres dying
// by itself closes Postgres.Done. What Postgres logs is in postgres.log beside its data.
package embedded
