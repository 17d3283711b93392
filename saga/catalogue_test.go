package saga_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/saga"
)

// counted counts the loads of a catalogue and may hold or fail them.
type counted struct {
	prices
	loads atomic.Int32
	asked atomic.Int32
	fail  atomic.Pointer[error]
	hold  chan struct{}
}

func (c *counted) Products(ctx context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error) {
	c.loads.Add(1)
	c.asked.Add(int32(len(skus)))
	p, err := c.prices.Products(ctx, skus)
	if c.hold != nil {
		select {
		case <-c.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if e := c.fail.Load(); e != nil {
		return nil, *e
	}
	return p, err
}

func cached(t *testing.T, src *counted) *saga.CachedCatalogue {
	t.Helper()
	c, err := saga.NewCachedCatalogue(src, saga.CatalogueConfig{Products: 100, TTL: time.Minute, Absent: time.Second, Load: 10 * time.Second})
	require.NoError(t, err)
	return c
}

func price(t *testing.T, c saga.Catalogue, sku domain.SKU) int64 {
	t.Helper()
	p, err := c.Products(context.Background(), []domain.SKU{sku})
	require.NoError(t, err)
	if got, ok := p[sku]; ok {
		return got.UnitPrice.Minor
	}
	return -1
}

func TestCatalogueRemembersAndForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &counted{prices: prices{of: map[domain.SKU]int64{"tea": 450, "cup": 700}}}
		c := cached(t, src)
		defer c.Close()
		p, err := c.Products(t.Context(), []domain.SKU{"tea", "cup", "wine", "tea"})
		require.NoError(t, err)
		require.Len(t, p, 2)
		require.EqualValues(t, 1, src.loads.Load(), "one load for all that is missing")
		require.EqualValues(t, 3, src.asked.Load())
		for range 10 {
			require.EqualValues(t, 450, price(t, c, "tea"))
			require.EqualValues(t, -1, price(t, c, "wine"))
		}
		require.EqualValues(t, 1, src.loads.Load())

		src.of["wine"] = 900
		<-time.After(1300 * time.Millisecond)
		require.EqualValues(t, 900, price(t, c, "wine"), "absence is remembered for a shorter time")
		require.EqualValues(t, 450, price(t, c, "tea"))
		require.EqualValues(t, 2, src.loads.Load())

		src.of["tea"] = 500
		<-time.After(45 * time.Second)
		require.EqualValues(t, 450, price(t, c, "tea"), "not before 0.8 of the time")
		<-time.After(27 * time.Second)
		require.EqualValues(t, 500, price(t, c, "tea"), "not after 1.2 of it")
	})
}

func TestCatalogueExpiriesAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &counted{prices: prices{of: map[domain.SKU]int64{}}}
		var skus []domain.SKU
		for i := range 50 {
			sku := domain.SKU(fmt.Sprint("p", i))
			src.of[sku] = 1
			skus = append(skus, sku)
		}
		c := cached(t, src)
		defer c.Close()
		_, err := c.Products(t.Context(), skus)
		require.NoError(t, err)
		src.asked.Store(0)
		<-time.After(time.Minute)
		_, err = c.Products(t.Context(), skus)
		require.NoError(t, err)
		n := src.asked.Load()
		require.True(t, n > 5 && n < 45, "%d of 50 expired in the middle of the span", n)
	})
}

func TestCatalogueLoadsOnceForACrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &counted{prices: prices{of: map[domain.SKU]int64{"tea": 450}}, hold: make(chan struct{})}
		c := cached(t, src)
		defer c.Close()
		first, giveUp := context.WithCancel(t.Context())
		gone := make(chan error, 1)
		go func() {
			_, err := c.Products(first, []domain.SKU{"tea"})
			gone <- err
		}()
		synctest.Wait()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if p, err := c.Products(context.Background(), []domain.SKU{"tea"}); err != nil || p["tea"].UnitPrice.Minor != 450 {
					t.Errorf("%v, %v", p, err)
				}
			})
		}
		synctest.Wait()
		giveUp() // whoever began the load leaves; it is not theirs to take along
		require.ErrorIs(t, <-gone, context.Canceled)
		close(src.hold)
		wg.Wait()
		require.EqualValues(t, 1, src.loads.Load())
	})
}

func TestCatalogueDoesNotRememberFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &counted{prices: prices{of: map[domain.SKU]int64{"tea": 450}}}
		c := cached(t, src)
		defer c.Close()
		away := errors.New("no database")
		src.fail.Store(&away)
		_, err := c.Products(t.Context(), []domain.SKU{"tea"})
		require.ErrorIs(t, err, away)
		src.fail.Store(nil)
		require.EqualValues(t, 450, price(t, c, "tea"))
	})
}

func TestCatalogueLoadIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &counted{hold: make(chan struct{})}
		c := cached(t, src)
		begun := time.Now()
		_, err := c.Products(t.Context(), []domain.SKU{"tea"})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 10*time.Second, time.Since(begun))

		left := make(chan error, 1)
		go func() {
			_, err := c.Products(t.Context(), []domain.SKU{"tea"})
			left <- err
		}()
		synctest.Wait()
		c.Close()
		require.ErrorIs(t, <-left, context.Canceled)
		_, err = c.Products(t.Context(), []domain.SKU{"tea"})
		require.ErrorContains(t, err, "closed")
	})
}

// TestInvalidateWhileLoading: a price that was read before it changed must not be remembered after.
func TestInvalidateWhileLoading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &counted{prices: prices{of: map[domain.SKU]int64{"tea": 450}}, hold: make(chan struct{})}
		c := cached(t, src)
		defer c.Close()
		old := make(chan int64, 1)
		ask := func(to chan<- int64) {
			p, err := c.Products(context.Background(), []domain.SKU{"tea"})
			if err != nil {
				t.Error(err)
			}
			to <- p["tea"].UnitPrice.Minor
		}
		go ask(old)
		synctest.Wait()
		src.mu.Lock()
		src.of["tea"] = 500
		src.mu.Unlock()
		c.Invalidate("tea")
		fresh := make(chan int64, 1)
		go ask(fresh)
		synctest.Wait()
		close(src.hold)
		require.EqualValues(t, 450, <-old, "it asked before the change")
		require.EqualValues(t, 500, <-fresh)
		require.EqualValues(t, 500, price(t, c, "tea"))
		require.EqualValues(t, 2, src.loads.Load())

		src.of["tea"] = 600
		c.Invalidate("tea")
		require.EqualValues(t, 600, price(t, c, "tea"), "at once in this process")
	})
}

func TestCatalogueIsBounded(t *testing.T) {
	src := &counted{}
	c := cached(t, src)
	defer c.Close()
	for i := range 2000 {
		price(t, c, domain.SKU(fmt.Sprint("nobody-", i)))
	}
	require.LessOrEqual(t, c.Size(), 150)
}

// Many products that are asked for all the time are loaded together, not one by one as each of them ends; what nobody asks for is let go.
func TestCatalogueLoadsTogetherWhatEndsSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, unwanted = 60, 10
		src := &counted{prices: prices{of: map[domain.SKU]int64{}}}
		var skus []domain.SKU
		for i := range n {
			skus = append(skus, domain.SKU(fmt.Sprintf("sku-%d", i)))
			src.of[skus[i]] = 100
		}
		c := cached(t, src) // a minute
		defer c.Close()
		_, err := c.Products(t.Context(), skus)
		require.NoError(t, err)
		require.EqualValues(t, 1, src.loads.Load())
		seconds := 600
		for i := range seconds {
			for _, sku := range skus[unwanted:] {
				require.EqualValues(t, 100, price(t, c, sku))
			}
			if i == 1 {
				c.Invalidate(skus[n-1])
			}
			<-time.After(time.Second)
		}
		loads, asked := int(src.loads.Load()), int(src.asked.Load())
		require.Less(t, loads, 350, "one by one there would be 500")
		require.GreaterOrEqual(t, asked, (n-unwanted)*seconds/72, "none lives longer than 1.2 of its time")
		require.LessOrEqual(t, asked, n+(n-unwanted)*seconds/47+n, "nor is one loaded much before it ends, or that nobody asks for")
		require.LessOrEqual(t, c.Size(), n)
	})
}
