package kafka

import (
	"unsafe"

	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/events"
)

// records turns fetched records into ours. The bytes and the headers are shared: nobody writes to them. known leads from names in Kafka
// to ours.
func records(fetches kgo.Fetches, known map[string]events.Topic) []events.Record {
	n := fetches.NumRecords()
	if n == 0 {
		return nil
	}
	out := make([]events.Record, 0, n)
	fetches.EachPartition(func(p kgo.FetchTopicPartition) {
		topic := known[p.Topic]
		for _, r := range p.Records {
			out = append(out, received(r, topic))
		}
	})
	return out
}

func received(r *kgo.Record, topic events.Topic) events.Record {
	return events.Record{
		Topic: topic, Partition: r.Partition, Offset: r.Offset, Timestamp: r.Timestamp, Key: r.Key, Value: r.Value, Headers: headersOf(r.Headers),
	}
}

// headersOf shows the client's headers as ours, without a copy.
func headersOf(h []kgo.RecordHeader) []events.Header {
	_ = events.Header(kgo.RecordHeader{})                                              // compiles as long as the two have the same fields, and so the same layout
	return unsafe.Slice((*events.Header)(unsafe.Pointer(unsafe.SliceData(h))), len(h)) //nolint:gosec // see above; a copy for each record was a fiftieth of what a saga allocates
}

// record turns one of ours into what is produced. Partition and Offset are Kafka's to give; a zero Timestamp is too.
func record(r *events.Record, names events.Names) *kgo.Record {
	headers := make([]kgo.RecordHeader, len(r.Headers)) // a copy: hooks write to it
	for i, h := range r.Headers {
		headers[i] = kgo.RecordHeader(h)
	}
	return &kgo.Record{Topic: names.Topic(r.Topic), Key: r.Key, Value: r.Value, Headers: headers, Timestamp: r.Timestamp}
}
