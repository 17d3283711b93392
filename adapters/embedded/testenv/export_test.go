//go:build unix

package testenv

import "context"

// What the tests look at beyond the package's door.
var (
	Need           = need
	KafkaLibs      = kafkaLibs
	GivenKafka     = givenKafka
	StartRealKafka = startRealKafka
)

// StartServerAt uses a lasting server, as DatabaseURLVariable does, and returns a maker of template databases and the end of it.
func StartServerAt(url string) (create func(context.Context) (string, error), stop func(context.Context) error, err error) {
	s := &server{url: url, templates: map[string]string{}}
	ctx, cancel := context.WithTimeout(context.Background(), databaseTimeout)
	defer cancel()
	if err := s.dropStale(ctx); err != nil {
		return nil, nil, err
	}
	return func(context.Context) (string, error) {
		return s.template("key", func(context.Context, string) error { return nil })
	}, s.dropTemplates, nil
}
