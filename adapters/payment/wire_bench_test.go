package payment

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
)

// BenchmarkDoOverHTTP is a call over a connection that is kept, with net/http on the other side: both sides' work together.
func BenchmarkDoOverHTTP(b *testing.B) {
	var fields map[string]any // of a real answer, without its charge
	require.NoError(b, json.Unmarshal(sample(b), &fields))
	fields["latest_charge"], fields["status"] = "ch_1", statusRequiresCapture
	body, err := json.Marshal(fields)
	require.NoError(b, err)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			_, _ = w.Write(body) // the caller sees what is missing
		}
	}))
	b.Cleanup(srv.Close)
	g := newGateway(b, testConfig(srv.URL))
	r := testRequest(domain.Authorize)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := g.Do(context.Background(), r); err != nil {
			b.Fatal(err)
		}
	}
}

// The SDK does not say how long a body is; a gateway, and proxies on the way to it, should not have to put chunks together.
func TestBodiesAreSentWhole(t *testing.T) {
	var lengths []int64
	var encodings [][]string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lengths, encodings = append(lengths, r.ContentLength), append(encodings, r.TransferEncoding)
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, intentBody("requires_capture")) // the caller sees what is missing
	}))
	t.Cleanup(srv.Close)
	_, err := newGateway(t, testConfig(srv.URL)).Do(t.Context(), testRequest(domain.Authorize))
	require.NoError(t, err)
	require.Len(t, lengths, 1)
	require.Positive(t, lengths[0])
	require.Empty(t, encodings[0])
}
