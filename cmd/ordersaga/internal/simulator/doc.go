// Package simulator is a payment gateway to develop and test against: a stateful server of the part of Stripe's API that
// adapters/payment uses, and of the faults that a real one has.
//
// It owns a ledger: intents, refunds and idempotency keys. It promises what Stripe documents, as far as a payment's safety hangs on it:
//
//   - An intent is held once, captured at most once and refunded for no more than was captured; a move that its state forbids is
//     refused with payment_intent_unexpected_state.
//   - The first answer under an idempotency key, a 500 included, is stored for 24 hours and repeated with Idempotent-Replayed: true.
//     Other parameters under the same key: 400 idempotency_error. The key while its first request is being worked on: 409. A request
//     that fails validation, is not authenticated or is throttled stores nothing.
//   - Lists are newest first, consistent with every answered write, and paged by id.
//
// With a directory it also survives kill -9 of its process: an effect and the answer stored under its key are one line of a
// journal, written before the answer is sent. The journal is not fsynced: it does not survive the machine.
//
// Faults are set at run time, in Go or with PUT /_control; see Faults. They are dealt from a seeded generator, so that the same calls
// in the same order meet the same faults. When its journal cannot be written, every write is answered 500 and nothing changes.
//
// It has no notion of accounts, customers, currencies' minor units, disputes or webhooks. Intents stay in memory for good: it is no
// server for years.
package simulator
