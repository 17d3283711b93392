// Package domain holds the values and rules of the order saga: Order, Money, Stock, Reservation, Payment and the barrier that
// makes a step and its undo safe to repeat in any order.
//
// It owns what is legal. It promises that no function here does I/O, reads a clock, logs or keeps state between calls: time and
// identity are passed in, the answer is a value. When an input is impossible it answers an error that says what was wrong; it
// never changes half of something.
package domain
