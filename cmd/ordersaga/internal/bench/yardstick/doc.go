// Command yardstick runs this system and another one beside it under one load on one machine, and reports the ratios.
//
//	go run ./cmd/ordersaga/internal/bench/yardstick --plain ../shared/bench/plain --rounds 3
//
// The other system is `plain`: an order saga as it is written by hand in a week, one transaction a message. Both get the same orders (1 to 3 of
// 1,000 products, 2 % declined), the same Postgres (fsync on), the same Kafka (real jars, acks=all) and the same payment gateway, a stub
// that answers in 5 ms and is called twice a payment; they run one after the other, in alternating order, so that a machine that gets warm or busy
// does so for both. A saga has ended when the commit of its last row says so, read from Postgres afterwards; so nothing of the measuring
// lies in anybody's way. The CPU of the load generator (this process) and of the stub (a process of its own) is told apart.
//
// `yardstick scale EXPERIMENT` runs this system alone, one case beside another (more partitions, an open transaction, twice the load), on the same servers and
// under the same meters: bench/scale.sh, docs/scaling.md.
//
// After every run the books are checked: every order ended as it should, and was charged once. A run whose books are wrong does not count, and the
// exit status is 1. Everything that was started is stopped, and its data removed, also after an interrupt.
package main
