package payment

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/stripe/stripe-go/v85"
	"pgregory.net/rapid"

	"ordersaga/domain"
)

// The two forms that are written by hand are the SDK's, to the byte: a request that was begun under another version of this program is
// repeated the same.
func TestFormsAreTheSDKs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := testRequest(domain.Authorize)
		r.Order = domain.NewOrderID()
		r.Amount.Minor = rapid.Int64Range(1, domain.MaxMinor).Draw(t, "amount")
		r.Amount.Currency = rapid.StringMatching("[A-Z]{3}").Draw(t, "currency")
		r.Method = rapid.OneOf(rapid.StringMatching("pm_[A-Za-z0-9_]{1,30}"), rapid.StringN(1, 40, domain.MaxIDLength)).Draw(t, "method")
		require.Equal(t, encode(&stripe.PaymentIntentParams{
			Amount:                stripe.Int64(r.Amount.Minor),
			Currency:              stripe.String(strings.ToLower(r.Amount.Currency)),
			CaptureMethod:         stripe.String(string(stripe.PaymentIntentCaptureMethodManual)),
			Confirm:               stripe.Bool(true),
			ErrorOnRequiresAction: stripe.Bool(true),
			PaymentMethod:         stripe.String(r.Method),
			PaymentMethodTypes:    []*string{stripe.String("card")},
			Metadata:              map[string]string{orderID: r.Order.String()},
		}), authorizeForm(r))
		require.Equal(t, encode(&stripe.PaymentIntentCaptureParams{AmountToCapture: stripe.Int64(r.Amount.Minor)}), captureForm(r))
	})
}
