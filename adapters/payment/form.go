package payment

import (
	"net/url"
	"strconv"
	"strings"

	"github.com/stripe/stripe-go/v85/form"

	"ordersaga/domain"
)

// encode writes parameters in the SDK's own form encoding, from the SDK's own types.
func encode(params any) string {
	if params == nil {
		return ""
	}
	v := &form.Values{}
	form.AppendTo(v, params)
	return v.Encode()
}

// authorizeForm is what encode makes of the SDK's PaymentIntentParams, byte for byte, without the walk by reflection over all that is not
// set: one of the two requests of every order.
func authorizeForm(r domain.PaymentRequest) string {
	b := make([]byte, 0, 256)
	b = strconv.AppendInt(append(b, "amount="...), r.Amount.Minor, 10)
	b = append(append(b, "&capture_method=manual&confirm=true&currency="...), url.QueryEscape(strings.ToLower(r.Amount.Currency))...)
	b = append(append(b, "&metadata["+orderID+"]="...), r.Order.String()...)
	b = append(append(b, "&payment_method="...), url.QueryEscape(r.Method)...)
	// Nobody is there to be asked: a bank that wants to is a refusal.
	return string(append(b, "&payment_method_types[0]=card&error_on_requires_action=true"...))
}

// captureForm is what encode makes of PaymentIntentCaptureParams: the other request.
func captureForm(r domain.PaymentRequest) string {
	return "amount_to_capture=" + strconv.FormatInt(r.Amount.Minor, 10)
}
