// Package steps holds one small handler for each thing the order saga does: stock, payment, the two compensations, replies to the
// coordinator, and order commands from producers.
//
// Each owns the translation between messages and the domain, and nothing else: what is legal is domain's and saga's, what becomes of
// a record is consumers'. Each promises that acting twice, late, or after its own undo is harmless, by the barrier rows that it
// reads and writes in the transaction of its effect.
package steps
