// Package events is the wire: what a message is called, which topic and group it belongs to, and how it is written and read.
//
// It owns the Envelope (CloudEvents 1.0 attributes in binary mode), the codec and the one table that leads from a message type to
// its topic, its group, its retry topics and its dead-letter queue. It promises that what Encode writes Decode reads, in this
// version and in every later one (golden files in testdata are never edited), and that a record it cannot read is answered with an
// error that says what to add or change. It does no I/O.
//
// Changing a message, read schemas/proto first. Adding one: schemas/proto, then the table in types.go, then a golden file.
package events
