package saga

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"

	"ordersaga/domain"
)

// CatalogueConfig bounds the catalogue's cache.
type CatalogueConfig struct {
	Products int           // entries, those that say "no such product" included; the least useful go first
	TTL      time.Duration // how old a price may be in other processes; each entry lives between 0.8 and 1.2 of it
	Absent   time.Duration // the same of "no such product"
	Load     time.Duration // how long one load may take, whoever waits for it
}

// DefaultCatalogue lets a new price reach every process within half a minute, and a new product within seconds.
var DefaultCatalogue = CatalogueConfig{Products: 100_000, TTL: 25 * time.Second, Absent: 3 * time.Second, Load: 5 * time.Second}

// CachedCatalogue remembers products for a while. What many ask for at once is loaded once; a caller that gives up does not take the
// load from the others; a load that failed is not remembered. A load takes along what was asked for lately and would have to be loaded soon after it.
type CachedCatalogue struct {
	source Catalogue
	cfg    CatalogueConfig
	cache  *otter.Cache[domain.SKU, *shelfEntry]
	clock  steadyClock

	ctx    context.Context //nolint:containedctx // of the loads: they outlive the caller that began them; Close ends it
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	flights map[domain.SKU]*flight
	ending  map[int64][]domain.SKU // products that end by a second of the clock, until that has passed
}

type shelfEntry struct {
	product domain.Product
	found   bool
	lasts   time.Duration
	ends    int64       // the second of the clock; of one that was found
	used    atomic.Bool // asked for since it was loaded
}

// alongAtMost bounds what a load takes along.
const alongAtMost = 256

// flight is one load under way, of one or more products.
type flight struct {
	done  chan struct{}
	found map[domain.SKU]domain.Product
	err   error
	stale map[domain.SKU]bool // changed since it began: not to be remembered
}

// steadyClock goes on from when it was made by the monotonic clock: one that is set back must not keep an old price (F18). It gives
// the cache no ticks, so that it starts no goroutine: what expired goes when it is met or pushed out.
type steadyClock struct{ made time.Time }

func (c steadyClock) NowNano() int64                    { return c.made.UnixNano() + int64(time.Since(c.made)) }
func (steadyClock) Tick(time.Duration) <-chan time.Time { return nil }

// NewCachedCatalogue puts a cache before source. Close ends the loads under way.
func NewCachedCatalogue(source Catalogue, cfg CatalogueConfig) (*CachedCatalogue, error) {
	c := &CachedCatalogue{source: source, cfg: cfg, flights: map[domain.SKU]*flight{}, ending: map[int64][]domain.SKU{}, clock: steadyClock{time.Now()}}
	var err error
	c.cache, err = otter.New(&otter.Options[domain.SKU, *shelfEntry]{
		MaximumSize:      cfg.Products,
		Clock:            c.clock,
		Executor:         func(fn func()) { fn() },
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[domain.SKU, *shelfEntry]) time.Duration { return e.Value.lasts }),
	})
	if err != nil {
		return nil, fmt.Errorf("catalogue cache: %w", err)
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// jitter spreads expiries over 0.8 to 1.2 of d, so that what was loaded together is not loaded again together.
func jitter(d time.Duration) time.Duration {
	return d - d/5 + rand.N(d/5*2+1)
}

// Products answers from memory what it can and loads the rest.
func (c *CachedCatalogue) Products(ctx context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error) {
	out := make(map[domain.SKU]domain.Product, len(skus))
	var missing []domain.SKU
	for _, sku := range skus {
		if !c.remembered(sku, out) {
			missing = append(missing, sku)
		}
	}
	if len(missing) == 0 {
		return out, nil
	}
	flights, err := c.board(missing, out) //nolint:contextcheck // a load is for whoever waits: it does not end with one caller
	if err != nil {
		return nil, err
	}
	for sku, f := range flights {
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if f.err != nil {
			return nil, f.err
		}
		if p, ok := f.found[sku]; ok {
			out[sku] = p
		}
	}
	return out, nil
}

// remembered puts a product into out if the cache has it; it also knows of products that are not there.
func (c *CachedCatalogue) remembered(sku domain.SKU, out map[domain.SKU]domain.Product) bool {
	e, ok := c.cache.GetIfPresent(sku)
	if ok && e.found {
		out[sku] = e.product
		if !e.used.Load() {
			e.used.Store(true)
		}
	}
	return ok
}

// remember keeps what a load has found; the lock is held.
func (c *CachedCatalogue) remember(sku domain.SKU, p domain.Product, found bool) {
	e := &shelfEntry{product: p, found: found, lasts: jitter(c.cfg.Absent)}
	if found {
		e.lasts = jitter(c.cfg.TTL)
		e.ends = c.second(e.lasts)
		c.ending[e.ends] = append(c.ending[e.ends], sku)
	}
	c.cache.Set(sku, e)
}

// second is that of the clock in which d will have passed.
func (c *CachedCatalogue) second(d time.Duration) int64 {
	return (c.clock.NowNano() + int64(d)) / int64(time.Second)
}

// along answers products that were asked for since they were loaded and end within a second, or a tenth of their time; the lock is held.
func (c *CachedCatalogue) along() (skus []domain.SKU) {
	until := c.second(min(time.Second, c.cfg.TTL/10))
	for at, list := range c.ending { // some more than the seconds of a TTL
		if at > until {
			continue
		}
		delete(c.ending, at)
		for _, sku := range list {
			e, ok := c.cache.GetEntryQuietly(sku)
			if ok && e.Value.ends == at && e.Value.used.Load() && c.flights[sku] == nil && len(skus) < alongAtMost {
				skus = append(skus, sku)
			}
		}
	}
	return skus
}

// board joins the flights under way and begins one for what none carries. What landed since the caller looked is put into landed.
func (c *CachedCatalogue) board(skus []domain.SKU, landed map[domain.SKU]domain.Product) (map[domain.SKU]*flight, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("catalogue is closed: %w", context.Canceled)
	}
	out := make(map[domain.SKU]*flight, len(skus))
	var fresh []domain.SKU
	for _, sku := range skus {
		if f := c.flights[sku]; f != nil {
			out[sku] = f
		} else if !c.remembered(sku, landed) {
			fresh = append(fresh, sku)
		}
	}
	if len(fresh) == 0 {
		return out, nil
	}
	fresh = append(fresh, c.along()...)
	slices.Sort(fresh)
	fresh = slices.Compact(fresh)
	f := &flight{done: make(chan struct{}), stale: map[domain.SKU]bool{}}
	for _, sku := range fresh {
		out[sku], c.flights[sku] = f, f
	}
	c.wg.Go(func() { c.load(f, fresh) })
	return out, nil
}

func (c *CachedCatalogue) load(f *flight, skus []domain.SKU) {
	ctx, cancel := context.WithTimeout(c.ctx, c.cfg.Load)
	defer cancel()
	f.found, f.err = c.source.Products(ctx, skus)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, sku := range skus {
		if f.stale[sku] {
			continue
		}
		delete(c.flights, sku)
		if f.err == nil {
			p, ok := f.found[sku]
			c.remember(sku, p, ok)
		}
	}
	close(f.done)
}

// Invalidate forgets a product that this process has just changed, also from a load under way.
func (c *CachedCatalogue) Invalidate(sku domain.SKU) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flights[sku]; f != nil {
		f.stale[sku] = true
		delete(c.flights, sku)
	}
	c.cache.Invalidate(sku)
}

// Close ends the loads under way and waits for them.
func (c *CachedCatalogue) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
}

// Size is about how many entries the cache holds.
func (c *CachedCatalogue) Size() int {
	c.cache.CleanUp()
	return c.cache.EstimatedSize()
}
