package postgres

import (
	"bytes"
	"context"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/consumers"
	"ordersaga/events"
)

func compare[T ~string](a, b T) int { return strings.Compare(string(a), string(b)) }

func compareUUIDs(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) }

// The range beside the list lets the executor prune partitions when it starts: the list alone would probe each. Locked in the order of ids.
const readInbox = `
SELECT message_id, state, ticket, hash FROM inbox
WHERE message_id BETWEEN $1 AND $2 AND message_id = ANY($3) AND grp = $4 ORDER BY message_id FOR NO KEY UPDATE`

// Inbox reads the rows of messages and locks them. Ids that are hashes of foreign ones are read apart (same round trip), for with
// them the range would span every partition.
func (t *Tx) Inbox(ctx context.Context, group events.Group, ids []uuid.UUID) (map[uuid.UUID]consumers.InboxRow, error) {
	out := make(map[uuid.UUID]consumers.InboxRow)
	if len(ids) == 0 {
		return out, nil
	}
	if first := t.first; first != nil {
		t.first = nil
		if !slices.ContainsFunc(ids, func(id uuid.UUID) bool { return !first[id] }) {
			return out, nil
		}
	}
	scan := func(r pgx.Rows) error {
		var row consumers.InboxRow
		if err := r.Scan((*[16]byte)(&row.MessageID), (*string)(&row.State), &row.Ticket, &row.Hash); err != nil {
			return err
		}
		out[row.MessageID] = row
		return nil
	}
	for _, part := range inboxParts(ids) {
		t.queueRead("read inbox", readInbox, []any{part[0], part[len(part)-1], part, string(group)}, scan)
	}
	return out, t.send(ctx, false)
}

// inboxParts sorts ids, and parts those that are hashes from those that carry a time; parts without any are left out.
func inboxParts(ids []uuid.UUID) [][]uuid.UUID {
	sorted := slices.Clone(ids)
	slices.SortFunc(sorted, compareUUIDs)
	n, _ := slices.BinarySearchFunc(sorted, firstTimed, compareUUIDs)
	return slices.DeleteFunc([][]uuid.UUID{sorted[:n], sorted[n:]}, func(part []uuid.UUID) bool { return len(part) == 0 })
}

// firstTimed is the least id that carries a time; those below are hashes (events.Identity).
var firstTimed = uuid.UUID{5: 1}

const inboxRow = "id uuid, state text, ticket bigint, hash bigint"

var insertInbox = over(inboxRow, func(u string) string {
	return `INSERT INTO inbox (message_id, grp, state, ticket, hash) SELECT id, $5, state, ticket, hash FROM ` + u
})

var replaceInbox = over(inboxRow, func(u string) string {
	return `INSERT INTO inbox (message_id, grp, state, ticket, hash) SELECT id, $5, state, ticket, hash FROM ` + u + ` ON CONFLICT (message_id, grp) DO UPDATE SET state = excluded.state, ticket = excluded.ticket, hash = excluded.hash, at = now()`
})

// SaveInbox inserts rows that are New, in the order of ids: one that is there nevertheless was claimed by somebody else meanwhile (F5),
// violates the primary key, and InTx starts over. The others replace what Inbox locked.
func (t *Tx) SaveInbox(_ context.Context, group events.Group, rows []consumers.InboxRow) error {
	rows = slices.Clone(rows)
	slices.SortFunc(rows, func(a, b consumers.InboxRow) int { return compareUUIDs(a.MessageID, b.MessageID) })
	var fresh, known []consumers.InboxRow
	for _, r := range rows {
		if r.New {
			fresh = append(fresh, r)
		} else {
			known = append(known, r)
		}
	}
	t.saveInbox("insert inbox", insertInbox, group, fresh)
	t.saveInbox("replace inbox", replaceInbox, group, known)
	return nil
}

func (t *Tx) saveInbox(name string, sql overRows, group events.Group, rows []consumers.InboxRow) {
	n := len(rows)
	if n == 0 {
		return
	}
	ids, states, tickets, hashes := make([]uuid.UUID, n), make([]string, n), make([]int64, n), make([]int64, n)
	for i, r := range rows {
		ids[i], states[i], tickets[i], hashes[i] = r.MessageID, string(r.State), r.Ticket, r.Hash
	}
	t.queueRows(name, sql, n, []any{ids, states, tickets, hashes}, string(group))
}
