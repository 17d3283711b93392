package kafka

import (
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

func TestCompressionsAreKnown(t *testing.T) {
	c, err := New(Config{Brokers: []string{"127.0.0.1:1"}, Names: events.Names{}})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	for _, name := range append([]string{""}, Compressions...) {
		p, err := c.NewProducer(ProducerConfig{Compression: name})
		require.NoError(t, err, name)
		p.Close()
	}
	_, err = c.NewProducer(ProducerConfig{Compression: "gzip"})
	require.ErrorContains(t, err, "snappy", "it says which there are")
}
