//go:build linux

// Package e2e drives the program as its users do: as processes, over HTTP, Kafka, SQL, kcat and Python, on a real Kafka and a real
// Postgres, while what it depends on fails and while it is killed itself.
//
// It owns the proof of the promises that only the whole can keep: what was accepted ends, nothing is charged twice, nothing is oversold,
// nothing stays unpublished. Beside the product's own audit the tests do the sums themselves, from the gateway's ledger, the public topic and
// the catalogue, as an audit that shares a mistake with the product would not see it.
//
// The binary is built once, with the race detector where the tests have it; a report of it in any log fails the test. Processes die with
// the test process. The normal run takes a few minutes on two cores; these variables make it a big one:
//
//	ORDERSAGA_E2E_ORDERS=1000   orders of the kill loop
//	ORDERSAGA_E2E_HOLD=60s      how long a transaction that wrote to the outbox is held open
//	ORDERSAGA_TEST_PYTHON       a Python that has confluent_kafka
package e2e
