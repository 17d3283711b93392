// Package consumers is the runtime between Kafka and a handler: decode → prepare → apply → settle (done, retry, dead letter).
//
// It owns what becomes of a record. It promises that every record ends in exactly one verdict, that the verdict and the handler's
// effects are one transaction, that an offset advances only after that transaction, and that a message acts once however often it
// is delivered: by its inbox row and, beyond the inbox's window, by the handler's own barrier.
//
// When things fail:
//   - The database or the broker is away (an outage): the batch is held and tried again; no attempt is spent, nothing is retried
//     through topics. So too when a handler names a dependency that is away (`Outage() string`), such as an open breaker.
//   - A record fails for now (transient): it moves to the group's next retry topic with a due time; after the last tier it is a dead
//     letter, unless its type is Endless: then it stays at the slowest tier and OnStalled hears of it.
//   - A record is poison (`Poison() bool`, undecodable, impossible): it is a dead letter at once.
//   - A data error of the database (SQLSTATE 22, 23) fails a batch: it is split by partition, then by record, until the one is found.
//
// A panic of a handler is poison for the record that causes it. A verdict that the database does not take stops consumption: to go on
// would be to lose a record.
//
// A record may be handed over by its writer, ahead of its copy from Kafka (early.go). Of the failure of such a one nothing is kept: its copy
// comes to it in full.
//
// Parking of later records of a failed key (subscriptions that are Ordered) will sit between claim and apply; see run.decide. Until
// then NewGroup refuses Ordered.
//
// Deciding is kept apart from doing: Policy.Decide, claims, Lanes and the splitting are plain functions of state, input and a clock.
//
// Changing what becomes of a failure, read policy.go; who may act, claim in settle.go; what a verdict leaves, write in settle.go; the
// headers of copies and of dead letters, headers.go; which records run together and how far offsets advance, lanes.go and pump.go; what
// operators do, replay.go. A store is held to the ports by storetest.
package consumers
