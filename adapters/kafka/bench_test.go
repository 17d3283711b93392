//go:build unix

package kafka

import (
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/events"
)

// BenchmarkRecords is what the adapter itself makes of a fetch: 16 partitions with 12 records each, with the headers of ours.
func BenchmarkRecords(b *testing.B) {
	const partitions, each = 16, 12
	id := events.NewID()
	headers := make([]kgo.RecordHeader, 0, 8)
	for _, h := range events.HeadersOf(events.Envelope{ID: id, Type: events.TReserveStock, Trace: events.Trace{TraceID: id, SpanID: [8]byte{1}}}) {
		headers = append(headers, kgo.RecordHeader(h))
	}
	topic := kgo.FetchTopic{Topic: "saga.stock.v1"}
	for p := range int32(partitions) {
		fp := kgo.FetchPartition{Partition: p}
		for o := range int64(each) {
			fp.Records = append(fp.Records, &kgo.Record{Topic: topic.Topic, Partition: p, Offset: o, Key: id[:], Value: id[:], Headers: headers})
		}
		topic.Partitions = append(topic.Partitions, fp)
	}
	fetches := kgo.Fetches{{Topics: []kgo.FetchTopic{topic}}}
	known := map[string]events.Topic{topic.Topic: events.TopicStock}
	b.ReportAllocs()
	for b.Loop() {
		if recs := records(fetches, known); len(recs) != partitions*each {
			b.Fatal(len(recs))
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*partitions*each), "ns/record")
}
