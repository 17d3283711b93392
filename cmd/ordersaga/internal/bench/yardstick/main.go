package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	command, args := "compare", os.Args[1:]
	if len(args) > 0 && (args[0] == "stub" || args[0] == "scale") {
		command, args = args[0], args[1:]
	}
	var err error
	switch command {
	case "stub":
		err = stubCommand(args)
	case "scale":
		err = scaleCommand(ctx, args)
	default:
		err = compareCommand(ctx, args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "yardstick:", err)
		os.Exit(1)
	}
}

func stubCommand(args []string) error {
	fs := flag.NewFlagSet("stub", flag.ExitOnError)
	addr, delay := fs.String("addr", "", "where to listen"), fs.Duration("delay", 0, "of each call")
	_ = fs.Parse(args) // it exits
	return serveStub(*addr, *delay)
}

func compareCommand(ctx context.Context, args []string) error {
	var o options
	fs := flag.NewFlagSet("yardstick", flag.ExitOnError)
	fs.StringVar(&o.plain, "plain", "../shared/bench/plain", "folder of plain's module")
	fs.StringVar(&o.root, "root", ".", "folder of this module")
	fs.StringVar(&o.libs, "kafka-libs", "", "folder of Kafka's jars (default: where the tests keep them)")
	fs.StringVar(&o.out, "out", "", "write all runs to this file as JSON")
	fs.StringVar(&o.only, "only", "", "run one side only: plain or ordersaga")
	fs.StringVar(&o.pprof, "profile", "", "put profiles of this system, its metrics and the statements' statistics into this folder; the run is slower for it")
	fs.Var(&o.variants, "variant", "a variant of this system to run beside it, as label[@binary][:NAME=value,NAME=value] (may be repeated)")
	fs.IntVar(&o.rounds, "rounds", 3, "runs of each side")
	fs.IntVar(&o.orders, "orders", 30_000, "orders of the saturation phase; 0: none")
	fs.IntVar(&o.warm, "warm-up", 3000, "orders before the first phase")
	fs.IntVar(&o.burnIn, "burn-in", 10_000, "orders that each side gets before the first round, not reported")
	fs.IntVar(&o.connections, "connections", 128, "requests at a time")
	fs.IntVar(&o.partitions, "partitions", 16, "of each topic that a saga runs on")
	fs.Float64Var(&o.rate, "rate", 200, "orders a second in the latency phase; 0: none")
	fs.DurationVar(&o.length, "length", 20*time.Second, "of the latency phase")
	fs.DurationVar(&o.limit, "limit", 5*time.Minute, "for the sagas of a phase to end")
	fs.DurationVar(&o.delay, "gateway", 5*time.Millisecond, "how long the gateway takes for a call")
	_ = fs.Parse(args) // it exits
	return o.run(ctx)
}
