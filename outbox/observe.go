package outbox

import "time"

// Observer hears what a relay does, for metrics, logs and alarms. Its methods must not block and may be called from several
// goroutines. Embed NoObserver to hear a part only.
type Observer interface {
	// WindowRead: a window had so many rows and took so long to read, waiting for the broker included.
	WindowRead(rows int, took time.Duration)
	// Produced: the broker acknowledged so many more records.
	Produced(n int)
	// HandedOver: so many of them went with the commit of their transaction, without a window.
	HandedOver(n int)
	// TakenEarly: so many messages were taken by their readers in this process, ahead of their way through Kafka.
	TakenEarly(n int)
	// BacklogSeen: what waits in the outbox, measured every Config.BacklogEvery.
	BacklogSeen(b Backlog)
	// CursorLag: how long ago the stored cursors were last level with what was read; 0 if they are.
	CursorLag(d time.Duration)
	// LeasesHeld: the relay holds so many shards.
	LeasesHeld(n int)
	// ShardFenced: another relay has taken a shard of this one, which dropped it at once.
	ShardFenced(shard int16)
	// RecordSetAside: Kafka refused a record for good. It is a dead letter now, or, if bare, it was a dead letter already and went to
	// its DLQ topic without its payload. Worth an alarm.
	RecordSetAside(m *Message, reason error, bare bool)
	// RelayFailed: something failed and is tried again; op says what.
	RelayFailed(op string, err error)
}

// NoObserver hears nothing.
type NoObserver struct{}

// WindowRead does nothing.
func (NoObserver) WindowRead(int, time.Duration) {}

// Produced does nothing.
func (NoObserver) Produced(int) {}

// HandedOver does nothing.
func (NoObserver) HandedOver(int) {}

// TakenEarly does nothing.
func (NoObserver) TakenEarly(int) {}

// BacklogSeen does nothing.
func (NoObserver) BacklogSeen(Backlog) {}

// CursorLag does nothing.
func (NoObserver) CursorLag(time.Duration) {}

// LeasesHeld does nothing.
func (NoObserver) LeasesHeld(int) {}

// ShardFenced does nothing.
func (NoObserver) ShardFenced(int16) {}

// RecordSetAside does nothing.
func (NoObserver) RecordSetAside(*Message, error, bool) {}

// RelayFailed does nothing.
func (NoObserver) RelayFailed(string, error) {}
