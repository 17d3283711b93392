// Package postgres keeps the state of the order saga: orders, sagas and their history, the catalogue, stock, payments, barriers,
// the inbox, the outbox, idempotency keys, dead letters and the operators' log.
//
// It owns the schema (migrations/), the statements (each beside its function) and the transaction. One *Tx satisfies the Tx port of
// every room, so that what a message did, that it was done, and what follows from it are one commit. It promises:
//
//   - Writes are queued and go with the next read, or with the commit, in one round trip; a transaction that queued nothing costs
//     nothing; one that never read goes as a single pipeline.
//   - Rows are locked in the order of their keys (F27). The order between tables is: order-id locks, inbox, sagas or reservations or
//     payments, stock. No statement touches two of orders, stock and payments, so that they can move to databases of their own.
//   - InTx starts over, with full jitter and a bound, on serialisation failures, deadlocks and rows that appeared meanwhile.
//   - No transaction takes a second connection (F23), and each purpose has a pool of its own: an operator's long list never starves
//     the intake.
//   - Plans of hot statements are pinned (F32): those pools plan once, generically, and only along indexes.
//
// When things fail: an error says which statement failed and answers `Outage() string` when the database is away, full, restarting
// or not migrated, and `DataError() bool` when a value was at fault. A connection lost during the commit is an outage too: whether
// it took effect is unknown, and every caller is safe to repeat. A cancelled context comes back as it is.
package postgres
