package boot

import (
	"fmt"
	"reflect"

	"go.yaml.in/yaml/v3"
)

// printHead is what a printed configuration begins with.
const printHead = `The settings in force, secrets masked. A file of this form is read by --config; the environment wins over it
(ORDERSAGA_KAFKA__TOPIC_PREFIX is kafka.topic_prefix), flags win over both. Read again while the process runs: log.level,
http.rate_per_caller and burst_per_caller, payment.rate, burst and concurrency, intake.max_running, max_outbox_age,
max_delay and min_free_disk_bytes, and the files of tokens and certificates.`

// YAML is the configuration as a file that Load reads, each setting with what it means, secrets masked.
func (c *Config) YAML() ([]byte, error) {
	n, err := described(reflect.ValueOf(*c), c.Printable())
	if err != nil {
		return nil, fmt.Errorf("print the configuration: %w", err)
	}
	b, err := yaml.Marshal(&yaml.Node{Kind: yaml.DocumentNode, HeadComment: printHead, Content: []*yaml.Node{n}})
	if err != nil {
		return nil, fmt.Errorf("print the configuration: %w", err)
	}
	return b, nil
}

// described makes a mapping in the order of the fields.
func described(v reflect.Value, values map[string]any) (*yaml.Node, error) {
	m := &yaml.Node{Kind: yaml.MappingNode}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		key := f.Tag.Get("koanf")
		value, shown := values[key]
		if !shown {
			continue
		}
		n := &yaml.Node{}
		var err error
		if inner, is := value.(map[string]any); is {
			n, err = described(v.Field(i), inner)
		} else {
			err = n.Encode(value)
		}
		if err != nil {
			return nil, err
		}
		m.Content = append(m.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: key, HeadComment: f.Tag.Get("doc")}, n)
	}
	return m, nil
}
