// Package kafka carries records between Kafka and the rooms: sources for consumer groups and their retry tiers, a producer for the
// relay, a tail of the public events, and what an operator does to topics. It is built on franz-go.
//
// It owns connections, group membership, offsets and topics' settings; what a record means and what becomes of it is consumers' and
// outbox's. It promises that an offset is committed only up to the first record that its handler has not settled, that nothing is
// produced with less than acks=all, that a member drains what it works on before its partitions go to another, and that topics are
// never deleted or shrunk.
//
// When things fail: a broker that is away is waited for, without end, and nothing is dropped meanwhile; every queue here is bounded,
// so that a slow handler slows its own fetching and nothing else. What the client cannot mend by itself (a topic that was deleted and
// made again, a fetch that is refused) ends its session: the member begins anew, from its committed offsets, after a pause.
//
// Facts that have caused bugs elsewhere, and that this package is shaped by:
//   - Rebalances are blocked from the return of a poll until AllowRebalance, so between them is nothing but appending to a queue. A
//     record never enters the queue of a partition that was revoked.
//   - A revoked partition is drained in the callback, and its marks are committed there: the next owner begins behind them.
//   - The client's own reset offset would rewind a minute; ours start and reset at the beginning: what is seen twice is harmless, what
//     is skipped is lost.
//   - Pausing a partition survives a rebalance and would stall it for ever: paused ones are resumed whenever partitions change hands.
package kafka
