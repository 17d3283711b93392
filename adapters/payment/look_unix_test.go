//go:build unix

package payment

import (
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
)

// A gateway closes kept connections as it likes, some after a last word. No call is lost to that, and what was said before the call is no
// answer to it.
func TestKeptConnectionsThatEndedAreNotUsed(t *testing.T) {
	for name, last := range map[string]string{"silently": "", "with a last word": "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			leave, left := make(chan struct{}), make(chan struct{})
			address, connections := gatewayOf(t, func(p *peer, connection int) {
				for {
					if _, ok := p.request(); !ok {
						return
					}
					p.say(withLength("", intentBody(statusSucceeded)))
					if connection == 1 {
						<-leave
						p.say(last)
						_ = p.Close()
						close(left)
						return
					}
				}
			})
			g := newGateway(t, testConfig("http://"+address))
			_, err := g.Do(t.Context(), testRequest(domain.Capture))
			require.NoError(t, err)
			close(leave)
			<-left
			for range 2 {
				_, err = g.Do(t.Context(), testRequest(domain.Capture))
				require.NoError(t, err)
			}
			require.EqualValues(t, 2, connections.Load())
		})
	}
}
