#!/usr/bin/env bash
# Runs this system and `plain` (an order saga written by hand, one transaction a message) under one load on this machine, in alternation, and
# prints every run, the medians and their ratios. It starts its own Postgres (fsync on), Kafka (from jars, 16 partitions), and gateway
# stub (Stripe-shaped, 5 ms a call), and stops and removes them at its end, an interrupt included.
#
#   bench/compare.sh                          three rounds, 30,000 orders at saturation, then 200/s for 20 s
#   bench/compare.sh --rounds 5 --out r.json  flags go on to the program: --help lists them
#   PLAIN=~/bench/plain bench/compare.sh      where plain's module is (default: ../shared/bench/plain)
#
# It needs Go, a JDK of version 17 or newer with Kafka's jars (the tests fetch them once), and PostgreSQL's programs. Leave the machine alone meanwhile:
# on two cores a browser is a third system under test.
set -euo pipefail
cd "$(dirname "$0")/.."

plain=${PLAIN:-../shared/bench/plain}
if [ ! -f "$plain/go.mod" ]; then
  echo "compare: no module of plain in $plain: set PLAIN to its folder" >&2
  exit 2
fi
load=$(cut -d' ' -f1 /proc/loadavg 2>/dev/null || echo 0)
if awk -v l="$load" 'BEGIN { exit !(l > 0.5) }'; then
  echo "compare: the machine is busy (load $load): the figures will be noisy" >&2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
go build -o "$scratch/yardstick" ./cmd/ordersaga/internal/bench/yardstick
"$scratch/yardstick" --plain "$plain" "$@"
