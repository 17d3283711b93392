package consumers

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds on text that reaches dead letters, headers and listings.
const (
	MaxErrorBytes = 1000
	MaxTypeBytes  = 200
)

// CleanText makes one line of at most limit bytes of text that may come from anywhere: control characters, line separators and
// marks that turn the direction of writing become spaces, bytes that are no UTF-8 become U+FFFD. What is cut off ends in an ellipsis.
func CleanText(s string, limit int) string {
	// Twice the limit is looked at, so that cleaning a huge error costs no more than cleaning a long one.
	cut := len(s) > 2*limit
	if cut {
		s = s[:2*limit]
	}
	var b strings.Builder
	space := false
	for _, r := range s {
		if unicode.IsSpace(r) || unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co) {
			space = b.Len() > 0
			continue
		}
		if space {
			b.WriteByte(' ')
			space = false
		}
		b.WriteRune(r)
	}
	out := b.String()
	if len(out) <= limit && !cut {
		return out
	}
	const ellipsis = "…"
	end := min(len(out), limit-len(ellipsis))
	for end > 0 && !utf8.RuneStart(out[min(end, len(out)-1)]) {
		end--
	}
	return out[:end] + ellipsis
}

var (
	uuidPattern   = regexp.MustCompile(`[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}`)
	numberPattern = regexp.MustCompile(`[0-9A-Za-z_]*[0-9][0-9A-Za-z_]*`)
)

// Fingerprint names the cause of a failure: class, message type and error without whatever has digits in it (ids, amounts, offsets).
// Dead letters with one cause share it.
func Fingerprint(class, typ, text string) string {
	text = uuidPattern.ReplaceAllString(text, "#")
	text = numberPattern.ReplaceAllString(text, "#")
	h := sha256.Sum256([]byte(class + "\x00" + typ + "\x00" + text))
	return hex.EncodeToString(h[:8])
}
