package payment

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/stripe/stripe-go/v85"
)

// testdata/intent.json is an answer of stripe-mock with its latest charge expanded: all the fields that the real API sends.
func sample(tb testing.TB) []byte {
	tb.Helper()
	b, err := os.ReadFile("testdata/intent.json")
	require.NoError(tb, err)
	return b
}

func TestSlimDecodingSeesWhatTheSDKSees(t *testing.T) {
	var full stripe.PaymentIntent
	require.NoError(t, json.Unmarshal(sample(t), &full))
	slim, err := decodeIntent(sample(t))
	require.NoError(t, err)
	require.Equal(t, full.ID, slim.ID)
	require.Equal(t, string(full.Status), slim.Status)
	require.Equal(t, full.Amount, slim.Amount)
	require.Equal(t, full.AmountReceived, slim.AmountReceived)
	require.Equal(t, string(full.Currency), slim.Currency)
	require.Equal(t, full.Created, slim.Created)
	require.True(t, slim.LatestCharge.Expanded)
	require.Equal(t, full.LatestCharge.ID, slim.LatestCharge.ID)
	require.Equal(t, full.LatestCharge.AmountRefunded, slim.LatestCharge.AmountRefunded)
}

func TestDecodersRefuseWhatIsNotTheAPIs(t *testing.T) {
	const good = `{"id":"pi_1","object":"payment_intent","status":"succeeded","amount":1,"amount_received":1,"currency":"eur","created":1,"latest_charge":"ch_1"}`
	in, err := decodeIntent([]byte(good))
	require.NoError(t, err)
	require.Equal(t, charge{ID: "ch_1"}, in.LatestCharge)
	for name, body := range map[string]string{
		"empty": "", "a page": "<html>secret</html>", "null": "null", "a list": "[]", "another object": strings.Replace(good, "payment_intent", "charge", 1),
		"no id": strings.Replace(good, "pi_1", "", 1), "an id that is a path": strings.Replace(good, "pi_1", "../x", 1),
		"no status": strings.Replace(good, "succeeded", "", 1), "a negative amount": strings.Replace(good, `"amount":1`, `"amount":-1`, 1),
		"an amount of words": strings.Replace(good, `"amount":1`, `"amount":"secret"`, 1), "an amount that overflows": strings.Replace(good, `"amount":1`, `"amount":1e30`, 1),
		"a charge of another kind": strings.Replace(good, `"ch_1"`, "7", 1), "cut short": good[:60],
	} {
		t.Run(name, func(t *testing.T) {
			_, err := decodeIntent([]byte(body))
			require.Error(t, err)
			require.NotContains(t, err.Error(), "secret")
		})
	}
	for _, body := range []string{`{}`, `{"object":"list","has_more":true,"data":[]}`, `{"object":"list","data":[{}]}`, `{"object":"list","data":7}`} {
		_, err := decodePage([]byte(body))
		require.Error(t, err, body)
	}
	for _, body := range []string{`{}`, `[]`, `{"object":"charge","id":"x"}`, `{"object":"refund"}`} {
		_, err := decodeRefund([]byte(body))
		require.Error(t, err, body)
	}
}

// Whatever bytes come: no panic, nothing accepted that breaks what the rest relies on, and never another reading than the SDK's.
func FuzzDecodeIntent(f *testing.F) {
	f.Add(sample(f))
	for _, s := range []string{
		`{"id":"pi_1","object":"payment_intent","status":"succeeded","amount":1,"latest_charge":null,"metadata":{"order_id":"x"}}`,
		`{"id":"pi_1","object":"payment_intent","status":"requires_payment_method","amount":1,"last_payment_error":{"code":"card_declined","decline_code":"lost_card"}}`,
		`{"ID":"pi_1","object":"payment_intent"}`, `{"id":"pi_1","Id":"pi_2","object":"payment_intent","status":"x","status":null,"latest_charge":{"id":"a"},"latest_charge":null}`,
		`{"latest_charge":{}}`, `[`, `"`, ``,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in, err := decodeIntent(b)
		if err != nil {
			return
		}
		if !validRef(in.ID) || in.Status == "" || in.Amount < 0 || in.AmountReceived < 0 {
			t.Fatalf("accepted %+v", in)
		}
		if out, ok := in.outcome(); ok && (out.Result == "" || out.Ref != in.ID) {
			t.Fatalf("%+v became %+v", in, out)
		}
		_ = in.entry()
		var full stripe.PaymentIntent
		if json.Unmarshal(b, &full) != nil {
			return // the SDK reads more fields and may stumble over one that is nothing to us
		}
		same := full.Metadata[orderID] == in.Metadata.OrderID && string(full.Currency) == in.Currency && full.Created == in.Created
		if c := full.LatestCharge; c != nil {
			same = same && c.ID == in.LatestCharge.ID && c.AmountRefunded == in.LatestCharge.AmountRefunded && c.Refunded == in.LatestCharge.Refunded
		}
		if e := full.LastPaymentError; e != nil {
			same = same && in.LastError != nil && string(e.Code) == in.LastError.Code && string(e.DeclineCode) == in.LastError.DeclineCode
		}
		if !same {
			t.Fatalf("the SDK reads %+v of it, we %+v", full, in)
		}
		if full.ID != in.ID || string(full.Status) != in.Status || full.Amount != in.Amount || full.AmountReceived != in.AmountReceived {
			t.Fatalf("the SDK reads %s %s %d %d of it, we %+v", full.ID, full.Status, full.Amount, full.AmountReceived, in)
		}
	})
}

func FuzzDecodePage(f *testing.F) {
	f.Add([]byte(`{"object":"list","has_more":false,"data":[` + string(sample(f)) + `]}`))
	f.Add([]byte(`{"object":"list","has_more":true,"data":[]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := decodePage(b)
		if err == nil && p.HasMore && len(p.Data) == 0 {
			t.Fatal("a page that would be asked for forever")
		}
	})
}

// What it is for: compare BenchmarkDecode/slim with BenchmarkDecode/sdk.
func BenchmarkDecode(b *testing.B) {
	body := sample(b)
	b.Run("slim", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := decodeIntent(body); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("sdk", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var in stripe.PaymentIntent
			if err := json.Unmarshal(body, &in); err != nil {
				b.Fatal(err)
			}
		}
	})
}
