package postgres

import (
	"ordersaga/consumers"
	"ordersaga/consumers/steps"
	"ordersaga/saga"
)

// One transaction satisfies the ports of all rooms; the database, their read sides.
var (
	_ consumers.Tx     = (*Tx)(nil)
	_ consumers.DeadTx = (*Tx)(nil)
	_ saga.Tx          = (*Tx)(nil)
	_ steps.StockTx    = (*Tx)(nil)
	_ steps.PaymentTx  = (*Tx)(nil)

	_ saga.Store[*Tx]      = (*View)(nil)
	_ consumers.Store[*Tx] = (*View)(nil)

	_ consumers.DeadReader = (*DB)(nil)
	_ saga.Reader          = (*DB)(nil)
	_ saga.Catalogue       = (*DB)(nil)
)
