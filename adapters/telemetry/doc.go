// Package telemetry is what the service says about itself: logs (zap), metrics (Prometheus) and traces (OpenTelemetry). It observes
// the rooms through their own ports and decorates their handlers; no room knows it.
//
// It promises:
//   - A failure is logged once, where it stops: the verdict on a delivery, a record set aside, a relay's failed attempt, a panic of a
//     handler. A storm of failures writes a bounded number of lines, and the first of each kind always among them.
//   - Nothing from outside reaches a log, a label or a span as it came (F26): control characters and escape sequences are taken out,
//     known secrets are masked, and every label is of a bounded set. Paths, ids and error texts are no labels.
//   - Observing never blocks or fails what is observed. Spans are exported in the background from a bounded queue; when it is full,
//     or the collector is away, spans are dropped and the work goes on.
//   - Every order has a trace id, from HTTP or its command record through outbox, Kafka and handlers to its last event, whether or
//     not its trace is recorded. What is not recorded costs next to nothing.
//
// # Metrics
//
// Times are in seconds, ages too. {group} is a consumer group (as in Kafka, with
// the prefix, for lag, partitions and buffers); {part} a part of the Kafka client (64 at most); {type} a message type of the table in events (unknown for any other
// on a public topic, other beyond 64); {verdict} done, hold, again, retry, dead, repeat, foreign; {class} the class of a dead letter, or
// transient; {dependency} what an error's Outage names (16 at most); {call} and {result} as in payment.Observer; {route} the
// pattern of the mux (100 at most; unmatched for none), never a path; {status} 2xx and so on, or aborted; {pool} the purpose of a connection pool.
//
//	ordersaga_build_info                              gauge      version,go_version       always 1
//	ordersaga_consumer_batch_duration_seconds         histogram  group                    a batch from poll to settled
//	ordersaga_consumer_batch_records                  histogram  group                    records in a batch
//	ordersaga_consumer_batches_interrupted_total      counter    group                    batches cut short by a rebalance or the end
//	ordersaga_consumer_buffered_records               gauge      group                    records fetched and not settled
//	ordersaga_consumer_failures_total                 counter    group,type,verdict,class failed deliveries
//	ordersaga_consumer_held_seconds                   gauge      group                    how long records wait for a dependency; 0 when one ended
//	ordersaga_consumer_holds_total                    counter    group,dependency         times that records were held back
//	ordersaga_consumer_lag_records                    gauge      group,topic,partition    records not settled; every process reports all partitions: take the max
//	ordersaga_consumer_panics_total                   counter    group                    panics of handlers and decoders
//	ordersaga_consumer_partitions_assigned            gauge      group                    partitions that this process holds
//	ordersaga_consumer_partitions_paused              gauge      group                    of those, paused because enough of them waits
//	ordersaga_consumer_retry_lateness_seconds         histogram  group                    retry copies: taken so long after they were due
//	ordersaga_consumer_splits_total                   counter    group                    batches taken apart to find a bad record
//	ordersaga_consumer_stalled_total                  counter    group,type               failures in the slowest tier, without a last attempt
//	ordersaga_consumer_transactions_total             counter    group                    transactions begun
//	ordersaga_consumer_followed_total                 counter    group                    messages handled in the transaction that emitted them
//	ordersaga_consumer_verdicts_total                 counter    group,verdict            verdicts; rate of done is the throughput
//	ordersaga_db_pool_acquires_total                  counter    pool                     connections taken
//	ordersaga_db_pool_acquire_waits_total             counter    pool                     of those, how many had to wait
//	ordersaga_db_pool_acquire_wait_seconds_total      counter    pool                     how long they waited together
//	ordersaga_db_pool_acquires_canceled_total         counter    pool                     given up before a connection was free
//	ordersaga_db_pool_connections                     gauge      pool,state               used, idle
//	ordersaga_db_pool_connections_limit               gauge      pool                     at most
//	ordersaga_dead_letters_open                       gauge      group                    dead letters that wait for a person
//	ordersaga_http_panics_total                       counter    route                    panics that reached the middleware
//	ordersaga_http_request_duration_seconds           histogram  route,method             until the answer was written; streams and waits included
//	ordersaga_http_requests_in_flight                 gauge      -                        requests and streams being answered
//	ordersaga_http_requests_total                     counter    route,method,status      requests answered
//	ordersaga_intake_batch_orders                     histogram  -                        orders placed in one transaction
//	ordersaga_intake_queue_length                     gauge      -                        submissions that wait
//	ordersaga_intake_queue_limit                      gauge      -                        at most
//	ordersaga_intake_submissions_total                counter    result                   accepted, repeated, queue_full, overloaded, key_reused, order_exists, unavailable, cancelled, other
//	ordersaga_intake_submission_duration_seconds      histogram  -                        until committed or refused
//	ordersaga_kafka_problems_total                    counter    part                     errors that the Kafka client deals with itself
//	ordersaga_outbox_backlog_measured_timestamp_seconds gauge    -                        when backlog and oldest age were last measured
//	ordersaga_outbox_backlog_rows                     gauge      -                        rows that wait
//	ordersaga_outbox_cursor_lag_seconds               gauge      -                        how old what would be repeated after a crash is
//	ordersaga_outbox_failures_total                   counter    operation                failed attempts of the relay
//	ordersaga_outbox_fenced_total                     counter    -                        shards that another relay took from this one
//	ordersaga_outbox_oldest_age_seconds               gauge      -                        age of the oldest row not known to be in Kafka
//	ordersaga_outbox_published_total                  counter    -                        records that Kafka acknowledged
//	ordersaga_outbox_handed_over_total                counter    -                        of them those that went with the commit of their transaction
//	ordersaga_outbox_taken_early_total                counter    -                        messages that their readers in this process took ahead of their way through Kafka
//	ordersaga_outbox_set_aside_total                  counter    kind                     records that Kafka refuses for good: message, or dead_letter (went without its value)
//	ordersaga_outbox_shards_leased                    gauge      -                        shards that this relay holds
//	ordersaga_outbox_window_duration_seconds          histogram  -                        one read of the outbox
//	ordersaga_outbox_window_rows                      histogram  -                        rows found by it
//	ordersaga_payment_breaker_state                   gauge      state                    1 for the state it is in: closed, half-open, open
//	ordersaga_payment_breaker_transitions_total       counter    state                    times that the state was entered
//	ordersaga_payment_call_duration_seconds           histogram  call                     calls that were sent
//	ordersaga_payment_calls_total                     counter    call,result              calls, sent or not
//	ordersaga_saga_oldest_running_age_seconds         gauge      -                        age of the oldest saga without an end
//	ordersaga_sagas_running                           gauge      -                        sagas without an end
//	ordersaga_sagas_stuck                             gauge      -                        sagas that wait for a late fact or a person
//
// Beside them go_* and process_* of the Prometheus client, with garbage collection pauses and scheduler latencies. Others (the Kafka
// client's) register themselves with Metrics.Registry.
package telemetry
