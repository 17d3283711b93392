#!/usr/bin/env bash
# Runs one experiment on how this system scales, on this machine, and prints its table: each case beside the one it is compared with, in turns,
# so that what counts is a ratio within one run. It starts its own Postgres (fsync on), Kafka (from jars) and gateway stub (5 ms a call), and
# stops and removes them at its end, an interrupt included. After each run the books are checked.
#
#   bench/scale.sh                            lists the experiments, with how long each takes
#   bench/scale.sh partitions --out p.json    runs one; --out keeps every run
#   bench/scale.sh rows --small               shows in a minute or two that it works
#   bench/scale.sh rows -h                    its flags
#
# It needs Go, a JDK of version 17 or newer with Kafka's jars (the tests fetch them once), PostgreSQL's programs and, for `rows`, 45 GB of disk. Leave the
# machine alone meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."

load=$(cut -d' ' -f1 /proc/loadavg 2>/dev/null || echo 0)
if [ $# -gt 0 ] && awk -v l="$load" 'BEGIN { exit !(l > 0.5) }'; then
  echo "scale: the machine is busy (load $load): the figures will be noisy" >&2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
go build -o "$scratch/yardstick" ./cmd/ordersaga/internal/bench/yardstick
"$scratch/yardstick" scale "$@"
