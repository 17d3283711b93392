package kafka

import (
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/events"
)

// records turns fetched records into ours. The bytes are shared: nobody writes to them. known leads from names in Kafka to ours.
func records(fetches kgo.Fetches, known map[string]events.Topic) []events.Record {
	n, headers := 0, 0
	fetches.EachPartition(func(p kgo.FetchTopicPartition) {
		n += len(p.Records)
		for _, r := range p.Records {
			headers += len(r.Headers)
		}
	})
	if n == 0 {
		return nil
	}
	out := make([]events.Record, 0, n)
	all := make([]events.Header, 0, headers) // of all records: one allocation
	fetches.EachPartition(func(p kgo.FetchTopicPartition) {
		topic := known[p.Topic]
		for _, r := range p.Records {
			from := len(all)
			all = appendHeaders(all, r)
			out = append(out, received(r, topic, all[from:len(all):len(all)]))
		}
	})
	return out
}

func appendHeaders(to []events.Header, r *kgo.Record) []events.Header {
	for _, h := range r.Headers {
		to = append(to, events.Header(h))
	}
	return to
}

func received(r *kgo.Record, topic events.Topic, headers []events.Header) events.Record {
	return events.Record{Topic: topic, Partition: r.Partition, Offset: r.Offset, Timestamp: r.Timestamp, Key: r.Key, Value: r.Value, Headers: headers}
}

// record turns one of ours into what is produced. Partition and Offset are Kafka's to give; a zero Timestamp is too.
func record(r *events.Record, names events.Names) *kgo.Record {
	headers := make([]kgo.RecordHeader, len(r.Headers)) // a copy: hooks write to it
	for i, h := range r.Headers {
		headers[i] = kgo.RecordHeader(h)
	}
	return &kgo.Record{Topic: names.Topic(r.Topic), Key: r.Key, Value: r.Value, Headers: headers, Timestamp: r.Timestamp}
}
