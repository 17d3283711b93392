package postgres

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"ordersaga/domain"
)

// clean makes free text storable: Postgres takes neither NUL nor broken UTF-8, and a message whose failure can't be written down
// would fail for ever.
func clean(s string) string {
	return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "\uFFFD")
}

// encodeLines writes [["sku",quantity,price],…], or without prices.
func encodeLines(lines []domain.Line, prices bool) (string, error) {
	b := append(make([]byte, 0, 2+40*len(lines)), '[')
	for i := range lines {
		l := &lines[i]
		if i > 0 {
			b = append(b, ',')
		}
		sku, err := json.Marshal(l.SKU)
		if err != nil {
			return "", fmt.Errorf("postgres: encode lines: %w", err)
		}
		b = append(append(b, '['), sku...)
		b = strconv.AppendInt(append(b, ','), l.Quantity, 10)
		if prices {
			b = strconv.AppendInt(append(b, ','), l.UnitPrice, 10)
		}
		b = append(b, ']')
	}
	return string(append(b, ']')), nil
}

// line reads what encodeLines wrote.
type line domain.Line

// UnmarshalJSON reads ["sku", quantity] or ["sku", quantity, price].
func (l *line) UnmarshalJSON(b []byte) error {
	l.UnitPrice = 0
	into := []any{&l.SKU, &l.Quantity, &l.UnitPrice}
	if err := json.Unmarshal(b, &into); err != nil {
		return fmt.Errorf("line %.100s: %w", b, err)
	}
	return nil
}

func decodeLines(b []byte) ([]domain.Line, error) {
	var rows []line
	if err := json.Unmarshal(b, &rows); err != nil {
		return nil, fmt.Errorf("postgres: decode lines: %w", err)
	}
	out := make([]domain.Line, len(rows))
	for i := range rows {
		out[i] = domain.Line(rows[i])
	}
	return out, nil
}
