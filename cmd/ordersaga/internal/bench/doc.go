// Package bench drives a running ordersaga with orders and reports what it did: how fast, how late, and at what cost.
//
// It owns the load (Load, Mix), the connections it is sent over (Conn), the clock that starts when an order was due rather than when the
// generator came to it, the meters beside it (processes, the service's own metrics, Postgres) and the Report with its comparison and
// chart. It promises that a latency is never better than what a customer saw: an order that waited in the generator waited. Its own
// CPU is measured apart, and it says when it was the limit itself (Phase.Unsent).
//
// When something that it measures is not there (no /proc, no metrics, no database), the report lacks those lines; when the service is not
// there, the run fails. Orders that were accepted and never ended are counted, not forgotten.
package bench
