package simulator

import (
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// params are a request's parameters, in Stripe's form encoding: metadata[order_id]=…, expand[0]=…
type params struct{ url.Values }

// root is the name before the first bracket.
func root(key string) string {
	if i := strings.IndexByte(key, '['); i > 0 {
		return key[:i]
	}
	return key
}

// unknown answers the first parameter, in alphabetical order, that the call does not take.
func (p params) unknown(known []string) string {
	first := ""
	for k := range p.Values {
		if !slices.Contains(known, root(k)) && (first == "" || k < first) {
			first = k
		}
	}
	return first
}

// list collects name[], name[0], name[1] and so on.
func (p params) list(name string) []string {
	var out []string
	for k, v := range p.Values {
		if strings.HasPrefix(k, name+"[") {
			out = append(out, v...)
		}
	}
	return out
}

// hash collects name[key]. Its size is bounded by the request's.
func (p params) hash(name string) map[string]string {
	out := map[string]string{}
	for k, v := range p.Values {
		if rest, ok := strings.CutPrefix(k, name+"["); ok && strings.HasSuffix(rest, "]") && len(v) > 0 {
			out[strings.TrimSuffix(rest, "]")] = v[0]
		}
	}
	return out
}

func (p params) bool(name string) (bool, *apiError) {
	switch v := p.Get(name); v {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, badParam(name, "", "Invalid boolean: "+v)
	}
}

// int answers def when the parameter is missing.
func (p params) int(name string, def, low, high int64) (int64, *apiError) {
	if !p.Has(name) {
		return def, nil
	}
	n, err := strconv.ParseInt(p.Get(name), 10, 64)
	if err != nil {
		return 0, badParam(name, "parameter_invalid_integer", "Invalid integer: "+p.Get(name))
	}
	if n < low || n > high {
		return 0, badParam(name, "parameter_invalid_integer", "This value must be between "+strconv.FormatInt(low, 10)+" and "+strconv.FormatInt(high, 10)+".")
	}
	return n, nil
}
