package telemetry

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strings"

	"go.uber.org/zap/zapcore"

	"ordersaga/consumers"
)

// maxText bounds one string of a log line or a span, in bytes.
const maxText = 4 << 10

// masked stands for what nobody may read in a log.
const masked = "[masked]"

// secretKeys are field names whose values are never shown: credentials, and what is about a person. Compared without case and
// without the separators _, - and a dot.
var secretKeys = map[string]bool{
	"authorization": true, "proxyauthorization": true, "cookie": true, "setcookie": true,
	"password": true, "passwd": true, "pass": true, "passphrase": true, "sslpassword": true, "secret": true, "clientsecret": true,
	"token": true, "accesstoken": true, "refreshtoken": true, "bearer": true, "apikey": true, "privatekey": true, "credentials": true,
	"paymentmethod": true, "card": true, "cardnumber": true, "pan": true, "cvc": true, "cvv": true, "iban": true,
	"email": true, "phone": true, "address": true, "clientaddress": true, "useragent": true, "useragentoriginal": true,
}

func secretKey(key string) bool {
	if len(key) > 64 {
		return false
	}
	var b [64]byte
	n := 0
	for i := range len(key) {
		c := key[i]
		switch {
		case c == '_' || c == '-' || c == '.':
			continue
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		}
		b[n] = c
		n++
	}
	return secretKeys[string(b[:n])]
}

var (
	// secretText finds credentials inside text: of a URL, of a connection string, of an Authorization header, keys of the gateway.
	secretText = regexp.MustCompile(`(?i)(://[^\s/:@]*:)[^\s@]+@|(\bpassword\s*[=:]\s*)(?:'[^']*'|"[^"]*"|[^\s'"&,;]+)|(\b(?:bearer|basic)\s+)[a-z0-9._~+/=-]{6,}|\b((?:sk|rk|pk)_(?:live|test)_|whsec_)[a-z0-9]+`)
	// ansi finds the escape sequences of terminals: colours, cursor moves, titles.
	ansi = regexp.MustCompile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[@-Z\\\\^_])|\u009b[0-?]*[ -/]*[@-~]")
)

// cleanText makes text fit for one line of a log: no line breaks, control characters or escape sequences (F26), no credentials that
// can be told as such, at most maxText bytes. Text that is fine already, and that is nearly all, is answered as it is.
func cleanText(s string) string {
	if !plain(s) {
		if len(s) > 2*maxText {
			s = strings.ToValidUTF8(s[:2*maxText], "\ufffd") // longer than what remains: CleanText marks the cut
		}
		s = consumers.CleanText(ansi.ReplaceAllString(s, ""), maxText)
	}
	if mayHoldSecret(s) {
		s = secretText.ReplaceAllStringFunc(s, func(m string) string {
			p := secretText.FindStringSubmatch(m)
			if p[1] != "" {
				return p[1] + masked + "@"
			}
			return p[2] + p[3] + p[4] + masked
		})
	}
	return s
}

// plain reports text of printable ASCII within the bound.
func plain(s string) bool {
	if len(s) > maxText {
		return false
	}
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

// mayHoldSecret is a cheap look whether the pattern could find anything.
func mayHoldSecret(s string) bool {
	if i := strings.Index(s, "://"); i >= 0 && strings.IndexByte(s[i:], '@') > 0 {
		return true
	}
	for i := range len(s) {
		switch s[i] {
		case 'b', 'B', 'p', 'P', 's', 'S', 'r', 'R', 'w', 'W':
			if startsSecret(s[i:]) {
				return true
			}
		}
	}
	return false
}

var secretStarts = []string{"bearer ", "basic ", "password", "sk_", "rk_", "pk_", "whsec_"}

func startsSecret(s string) bool {
	for _, p := range secretStarts {
		if len(s) >= len(p) && strings.EqualFold(s[:len(p)], p) {
			return true
		}
	}
	return false
}

// cleanObject hands what is encoded on to the encoder it wraps, cleaned and masked, at any depth.
type cleanObject struct{ zapcore.ObjectEncoder }

func (e cleanObject) AddString(key, v string) {
	if secretKey(key) {
		v = masked
	}
	e.ObjectEncoder.AddString(cleanKey(key), cleanText(v))
}

func (e cleanObject) AddByteString(key string, v []byte) { e.AddString(key, string(v)) }

func (e cleanObject) AddBinary(key string, v []byte) {
	if secretKey(key) {
		e.AddString(key, "")
		return
	}
	e.ObjectEncoder.AddBinary(cleanKey(key), v)
}

func (e cleanObject) AddObject(key string, v zapcore.ObjectMarshaler) error {
	if secretKey(key) {
		e.AddString(key, "")
		return nil
	}
	return e.ObjectEncoder.AddObject(cleanKey(key), inner{v})
}

func (e cleanObject) AddArray(key string, v zapcore.ArrayMarshaler) error {
	if secretKey(key) {
		e.AddString(key, "")
		return nil
	}
	return e.ObjectEncoder.AddArray(cleanKey(key), innerArray{v})
}

func (e cleanObject) AddReflected(key string, v any) error {
	if secretKey(key) {
		e.AddString(key, "")
		return nil
	}
	v, err := cleanAny(v)
	if err != nil {
		return err
	}
	return e.ObjectEncoder.AddReflected(cleanKey(key), v)
}

func (e cleanObject) OpenNamespace(key string) { e.ObjectEncoder.OpenNamespace(cleanKey(key)) }

// cleanKey: keys come from code, but for those of maps.
func cleanKey(key string) string {
	if plain(key) {
		return key
	}
	return cleanText(key)
}

type inner struct{ zapcore.ObjectMarshaler }

func (m inner) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	return m.ObjectMarshaler.MarshalLogObject(cleanObject{enc})
}

type innerArray struct{ zapcore.ArrayMarshaler }

func (m innerArray) MarshalLogArray(enc zapcore.ArrayEncoder) error {
	return m.ArrayMarshaler.MarshalLogArray(cleanArray{enc})
}

type cleanArray struct{ zapcore.ArrayEncoder }

func (e cleanArray) AppendString(v string)     { e.ArrayEncoder.AppendString(cleanText(v)) }
func (e cleanArray) AppendByteString(v []byte) { e.ArrayEncoder.AppendString(cleanText(string(v))) }
func (e cleanArray) AppendObject(v zapcore.ObjectMarshaler) error {
	return e.ArrayEncoder.AppendObject(inner{v})
}
func (e cleanArray) AppendArray(v zapcore.ArrayMarshaler) error {
	return e.ArrayEncoder.AppendArray(innerArray{v})
}
func (e cleanArray) AppendReflected(v any) error {
	v, err := cleanAny(v)
	if err != nil {
		return err
	}
	return e.ArrayEncoder.AppendReflected(v)
}

// cleanAny takes a value through its JSON form, which is what a log shows of it.
func cleanAny(v any) (any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber() // 64-bit integers stay what they are
	var tree any
	if err := d.Decode(&tree); err != nil {
		return nil, err
	}
	return cleanTree(tree), nil
}

func cleanTree(v any) any {
	switch v := v.(type) {
	case string:
		return cleanText(v)
	case []any:
		for i := range v {
			v[i] = cleanTree(v[i])
		}
		return v
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, x := range v {
			if secretKey(k) {
				x = masked
			}
			out[cleanKey(k)] = cleanTree(x)
		}
		return out
	default:
		return v
	}
}

// cleanCore cleans every entry before it is encoded.
type cleanCore struct{ zapcore.Core }

func (c cleanCore) With(fields []zapcore.Field) zapcore.Core {
	return cleanCore{c.Core.With(cleanFields(fields))}
}

func (c cleanCore) Check(ent zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(ent.Level) {
		return ce.AddCore(ent, c)
	}
	return ce
}

func (c cleanCore) Write(ent zapcore.Entry, fields []zapcore.Field) error {
	ent.Message, ent.LoggerName = cleanText(ent.Message), cleanText(ent.LoggerName)
	return c.Core.Write(ent, cleanFields(fields))
}

func cleanFields(fields []zapcore.Field) []zapcore.Field {
	if len(fields) == 0 {
		return nil
	}
	return []zapcore.Field{{Type: zapcore.InlineMarshalerType, Interface: fieldList(fields)}}
}

type fieldList []zapcore.Field

func (l fieldList) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	c := cleanObject{enc}
	for i := range l {
		l[i].AddTo(c)
	}
	return nil
}
