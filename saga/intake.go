package saga

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ordersaga/domain"
	"ordersaga/events"
)

// Submission is one order handed to the intake.
type Submission struct {
	Caller string
	Key    string   // Idempotency-Key
	Body   [32]byte // SHA-256 of the raw request body
	Draft  domain.Draft
	Trace  events.Trace
	Answer func(*domain.Order) []byte // renders what is stored and repeated under the key
}

// Accepted is the answer to a Submission.
type Accepted struct {
	Order  domain.OrderID
	Answer []byte
	Repeat bool // stored by an earlier submission
}

// OverloadedError sheds a request before anything was written.
type OverloadedError struct {
	Why   string
	After time.Duration // when to try again
	Full  bool          // the intake's own queue is full (429); else something behind it is (503)
}

func (e *OverloadedError) Error() string             { return "overloaded: " + e.Why }
func (e *OverloadedError) RetryAfter() time.Duration { return e.After }

// Errors of Submit beside *domain.Refusal and *OverloadedError.
var (
	ErrKeyReused   = errors.New("the Idempotency-Key was used with another body")
	ErrOrderExists = errors.New("the order_id belongs to an order placed under another key")
)

// IntakeConfig bounds the intake.
type IntakeConfig struct {
	Workers  int // transactions at a time
	MaxBatch int // orders a transaction
	Queue    int // requests waiting; more are shed
	// Committed hears how many orders a transaction takes up; nil: nobody does. It must not block.
	Committed func(orders int)
}

// DefaultIntake is sized for one process on a small machine: one batch commits while the next gathers.
var DefaultIntake = IntakeConfig{Workers: 1, MaxBatch: 128, Queue: 1024}

// Intake places orders for the HTTP interface: it prices them, and commits those that wait together in one transaction. It never
// waits for company: a lone request commits at once, a crowd gathers while the last batch commits.
//
// It presumes that keys and order ids are new, as they nearly always are, and writes without having read: one round trip. The database refuses what
// is there already; that batch is looked up and placed again, and so are all for a while, for whoever repeats one key may repeat another.
type Intake[T Tx] struct {
	db        Store[T]
	coord     *Coordinator
	catalogue Catalogue
	cfg       IntakeConfig
	admit     func() error // nil or *OverloadedError

	careful atomic.Int64 // until when nothing is presumed to be new, in Unix nanoseconds

	queue   chan *submission
	closing chan struct{} // Run was told to stop: nothing more is taken
	stopped chan struct{} // the workers are gone: what is not answered by now never will be
	wg      sync.WaitGroup
}

type submission struct {
	*Submission
	order *domain.Order
	given bool
	res   Accepted
	err   error
	ready chan struct{}
}

// NewIntake makes an Intake; Run starts it. admit is asked before each submission and may be nil.
func NewIntake[T Tx](db Store[T], coord *Coordinator, catalogue Catalogue, cfg IntakeConfig, admit func() error) *Intake[T] {
	return &Intake[T]{db: db, coord: coord, catalogue: catalogue, cfg: cfg, admit: admit, queue: make(chan *submission, cfg.Queue), closing: make(chan struct{}), stopped: make(chan struct{})}
}

// Run commits what Submit queues until ctx ends, then what is queued still, and returns.
func (in *Intake[T]) Run(ctx context.Context) error {
	for range in.cfg.Workers {
		in.wg.Go(func() { in.work(ctx) })
	}
	<-ctx.Done()
	close(in.closing)
	in.wg.Wait()
	close(in.stopped)
	return nil
}

var errStopping = &OverloadedError{Why: "shutting down", After: time.Second}

// Queued is how many submissions wait for a transaction.
func (in *Intake[T]) Queued() int { return len(in.queue) }

// Submit places an order, or answers what was stored under its key. When ctx ends first the order may still be placed: the caller
// asks again with the same key.
func (in *Intake[T]) Submit(ctx context.Context, s *Submission) (Accepted, error) {
	select {
	case <-in.closing:
		return Accepted{}, errStopping
	default:
	}
	if in.admit != nil {
		if err := in.admit(); err != nil {
			return Accepted{}, err
		}
	}
	products, err := in.catalogue.Products(ctx, s.Draft.SKUs())
	if err != nil {
		return Accepted{}, fmt.Errorf("prices: %w", err)
	}
	order, refusal := s.Draft.Price(products)
	if refusal != nil {
		return in.refused(ctx, s, refusal)
	}
	q := &submission{Submission: s, order: order, given: !order.ID.IsZero(), ready: make(chan struct{})}
	if !q.given {
		order.ID = domain.NewOrderID()
	}
	select {
	case in.queue <- q:
	default:
		return Accepted{}, &OverloadedError{Why: "the intake's queue is full", After: time.Second, Full: true}
	}
	select {
	case <-q.ready:
		return q.res, q.err
	case <-in.stopped:
		select {
		case <-q.ready:
			return q.res, q.err
		default:
			return Accepted{}, errStopping
		}
	case <-ctx.Done():
		return Accepted{}, ctx.Err()
	}
}

// refused looks whether the key was answered before the refusal's cause arose: a price may have changed since.
func (in *Intake[T]) refused(ctx context.Context, s *Submission, refusal *domain.Refusal) (Accepted, error) {
	var found []*IdempotencyKey
	err := in.db.InTx(ctx, func(ctx context.Context, tx T) (err error) {
		found, err = tx.FindKeys(ctx, []IdempotencyKey{{Caller: s.Caller, Key: s.Key}})
		return err
	})
	if err != nil {
		return Accepted{}, err
	}
	if found[0] != nil {
		return repeat(s, found[0])
	}
	return Accepted{}, refusal
}

func repeat(s *Submission, k *IdempotencyKey) (Accepted, error) {
	if k.Body != s.Body {
		return Accepted{}, ErrKeyReused
	}
	return Accepted{Order: k.Order, Answer: k.Answer, Repeat: true}, nil
}

func (in *Intake[T]) work(ctx context.Context) {
	batch := make([]*submission, 0, in.cfg.MaxBatch)
	for {
		select {
		case q := <-in.queue:
			batch = in.gather(append(batch[:0], q))
		case <-ctx.Done():
			if batch = in.gather(batch[:0]); len(batch) == 0 {
				return
			}
		}
		in.commit(context.WithoutCancel(ctx), batch)
	}
}

func (in *Intake[T]) gather(batch []*submission) []*submission {
	for len(batch) < in.cfg.MaxBatch {
		select {
		case q := <-in.queue:
			batch = append(batch, q)
		default:
			return batch
		}
	}
	return batch
}

// commitTimeout bounds one transaction of the intake, retries included.
const commitTimeout = 10 * time.Second

func (in *Intake[T]) commit(ctx context.Context, batch []*submission) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	// Sorted by key: two processes that meet on keys take them in one order.
	slices.SortStableFunc(batch, func(a, b *submission) int {
		return cmp.Or(cmp.Compare(a.Caller, b.Caller), cmp.Compare(a.Key, b.Key))
	})
	if in.cfg.Committed != nil {
		in.cfg.Committed(len(batch))
	}
	if err := in.try(ctx, batch); dataError(err) && len(batch) > 1 { // one of them is at fault: each for itself
		for i := range batch {
			_ = in.try(ctx, batch[i:i+1]) // each submission has its error
		}
	}
	for _, q := range batch {
		close(q.ready)
	}
}

// try places the batch in one transaction; its failure is the answer to all of them.
func (in *Intake[T]) try(ctx context.Context, batch []*submission) error {
	presume, again := time.Now().UnixNano() >= in.careful.Load(), false
	err := in.db.InTx(ctx, func(ctx context.Context, tx T) error {
		if again && presume { // something was there
			presume = false
			in.beCareful()
		}
		again = true
		return in.place(ctx, tx, batch, presume)
	})
	if err != nil {
		for _, q := range batch {
			q.res, q.err = Accepted{}, err
		}
	}
	return err
}

func dataError(err error) bool {
	var d interface{ DataError() bool }
	return errors.As(err, &d) && d.DataError()
}

// carefulFor is for how long the intake reads before it writes once it has met a key or an order id that was there. Whoever repeats keys all
// the time costs one refused transaction (and a line in the database's log) when he begins, and not one a batch.
const carefulFor = 5 * time.Second

func (in *Intake[T]) beCareful() { in.careful.Store(time.Now().Add(carefulFor).UnixNano()) }

func (in *Intake[T]) place(ctx context.Context, tx T, batch []*submission, presume bool) error {
	keys := make([]IdempotencyKey, len(batch))
	var given []domain.OrderID
	for i, q := range batch {
		q.res, q.err = Accepted{}, nil
		keys[i] = IdempotencyKey{Caller: q.Caller, Key: q.Key, Body: q.Body}
		if q.given {
			given = append(given, q.order.ID)
		}
	}
	switch {
	case presume:
		tx.PresumeNew(given)
	case len(given) > 0:
		tx.ForeseePlacing(given)
	}
	found, err := tx.FindKeys(ctx, keys)
	if err != nil {
		return err
	}
	leaders := make([]*submission, 0, len(batch))
	reqs := make([]PlaceRequest, 0, len(batch))
	var follows []*submission
	for i, q := range batch {
		switch {
		case found[i] != nil:
			in.beCareful()
			q.res, q.err = repeat(q.Submission, found[i])
		case len(leaders) > 0 && sameKey(leaders[len(leaders)-1], q):
			follows = append(follows, q)
		default:
			leaders = append(leaders, q)
			o := *q.order // the transaction may run again
			reqs = append(reqs, PlaceRequest{Order: &o, Hash: HashDraft(&q.Draft), Given: q.given, Trace: q.Trace})
		}
	}
	if len(leaders) == 0 {
		return nil
	}
	placed, err := in.coord.Place(ctx, tx, reqs)
	if err != nil {
		return err
	}
	fresh := make([]IdempotencyKey, 0, len(leaders))
	var out []events.Envelope
	for i, q := range leaders {
		if placed[i].Outcome != PlacedNew {
			in.beCareful()
			q.err = ErrOrderExists
			continue
		}
		q.res = Accepted{Order: reqs[i].Order.ID, Answer: q.Answer(reqs[i].Order)}
		fresh = append(fresh, IdempotencyKey{Caller: q.Caller, Key: q.Key, Body: q.Body, Order: q.res.Order, Answer: q.res.Answer})
		out = append(out, placed[i].Out...)
	}
	follow(leaders, follows)
	if len(fresh) == 0 {
		return nil
	}
	if err := tx.InsertKeys(ctx, fresh); err != nil {
		return err
	}
	return tx.Emit(ctx, out)
}

func sameKey(a, b *submission) bool { return a.Caller == b.Caller && a.Key == b.Key }

// follow answers submissions that came in one batch with the first of their key.
func follow(leaders, follows []*submission) {
	for _, q := range follows {
		for _, l := range leaders {
			if !sameKey(l, q) {
				continue
			}
			switch {
			case l.Body != q.Body:
				q.err = ErrKeyReused
			case l.err != nil:
				q.err = l.err
			default:
				q.res = l.res
				q.res.Repeat = true
			}
		}
	}
}
