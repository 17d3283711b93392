package postgres_test

import (
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/adapters/postgres"
	"ordersaga/consumers/storetest"
	"ordersaga/events"
)

// The contract of the runtime's stores, the same as the one in memory keeps.
func TestStoreSuiteOfConsumers(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Store[*postgres.Tx] {
		t.Helper()
		url := testenv.Postgres(t)
		db, err := postgres.Open(t.Context(), postgres.Config{URL: url})
		require.NoError(t, err)
		t.Cleanup(db.Close)
		_, err = postgres.Migrate(t.Context(), db, postgres.Up)
		require.NoError(t, err)
		conn, err := pgx.Connect(t.Context(), url)
		require.NoError(t, err)
		last := int64(0)
		return storetest.Store[*postgres.Tx]{Store: db.For(postgres.Consumers), Reader: db, Forwarded: func() (out []events.Raw) {
			rows, err := conn.Query(t.Context(), `SELECT id, topic, key, headers, payload FROM outbox WHERE topic IS NOT NULL AND id > $1 ORDER BY id`, last)
			require.NoError(t, err)
			defer rows.Close()
			for rows.Next() {
				var r events.Raw
				var h []byte
				require.NoError(t, rows.Scan(&last, (*string)(&r.Topic), &r.Key, &h, &r.Value))
				r.Headers, err = events.ParseHeaders(h)
				require.NoError(t, err)
				out = append(out, r)
			}
			require.NoError(t, rows.Err())
			return out
		}}
	})
}
