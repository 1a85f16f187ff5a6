//! When each command of an open loop is due, and who wakes the connections for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::ledger::share;

/// Commands that are due within this time are sent together: waking a thread costs about 10 µs.
const WAKE_INTERVAL_MIN: Duration = Duration::from_micros(100);

/// How long the pacer may sleep before it looks whether all is over.
const WAKE_INTERVAL_MAX: Duration = Duration::from_millis(50);

/// The commands of one thread at even distances, dealt to its connections in turn.
#[derive(Clone, Copy, Debug)]
pub struct Timetable {
    first_ns: f64,
    interval_ns: f64,
    connections: u64,
}

impl Timetable {
    pub fn new(rate: f64, threads: u64, thread: u64, connections: u64) -> Self {
        let interval_ns = 1e9 / rate;
        Self { first_ns: interval_ns * thread as f64, interval_ns: interval_ns * threads as f64, connections }
    }

    /// How many commands of the thread are due at this time after the start.
    pub fn due_count(&self, now_ns: u64) -> u64 {
        let since_first = now_ns as f64 - self.first_ns;
        if since_first < 0.0 { 0 } else { (since_first / self.interval_ns) as u64 + 1 }
    }

    pub fn due_count_of(&self, connection_index: u64, now_ns: u64) -> u64 {
        share(self.due_count(now_ns), self.connections, connection_index)
    }

    /// When the nth command of a connection is due, in nanoseconds after the start.
    pub fn due_ns(&self, connection_index: u64, nth: u64) -> u64 {
        let turn = connection_index + nth * self.connections;
        (self.first_ns + turn as f64 * self.interval_ns) as u64
    }
}

/// The wakers of the connections of one thread, and what was woken already.
#[derive(Debug)]
pub struct Sleepers {
    wakers: Vec<Option<Waker>>,
    woken: u64,
}

impl Sleepers {
    pub fn new(connections: usize) -> Self {
        Self { wakers: vec![None; connections], woken: 0 }
    }

    pub fn remember(&mut self, connection_index: usize, waker: &Waker) {
        match &mut self.wakers[connection_index] {
            Some(known) => known.clone_from(waker),
            unknown => *unknown = Some(waker.clone()),
        }
    }

    /// Wakes the connections whose turn has come.
    pub fn wake_due(&mut self, due_count: u64) {
        let count = self.wakers.len() as u64;
        for turn in self.woken..due_count.min(self.woken + count) {
            self.wake((turn % count) as usize);
        }
        self.woken = due_count;
    }

    pub fn wake_all(&self) {
        for index in 0..self.wakers.len() {
            self.wake(index);
        }
    }

    fn wake(&self, index: usize) {
        if let Some(waker) = &self.wakers[index] {
            waker.wake_by_ref();
        }
    }
}

/// Runs on a thread of its own, since the timers of tokio are no finer than a millisecond: wakes the threads of the load
/// whenever a command is due, but not more often than `WAKE_INTERVAL_MIN`.
pub fn pace(rate: f64, start: Instant, over: &AtomicBool, threads: &[Arc<Notify>]) {
    let interval = Duration::from_secs_f64(1.0 / rate);
    while !over.load(Ordering::Relaxed) {
        for thread in threads {
            thread.notify_one();
        }
        let passed = start.elapsed().as_secs_f64();
        let next_due = start + interval.mul_f64((passed * rate).floor() + 1.0);
        let pause = next_due.saturating_duration_since(Instant::now());
        std::thread::park_timeout(pause.clamp(WAKE_INTERVAL_MIN, WAKE_INTERVAL_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_due_once_and_at_even_distances() {
        let (rate, threads, connections) = (1000.0, 3, 4);
        let mut due = Vec::new();
        for thread in 0..threads {
            let timetable = Timetable::new(rate, threads, thread, connections);
            for connection in 0..connections {
                let count = timetable.due_count_of(connection, 999_999_999);
                due.extend((0..count).map(|nth| timetable.due_ns(connection, nth)));
            }
        }
        due.sort_unstable();
        let expected: Vec<u64> = (0..1000).map(|number| number * 1_000_000).collect();
        assert_eq!(due, expected);
    }

    #[test]
    fn nothing_is_due_before_the_first_turn() {
        let timetable = Timetable::new(10.0, 2, 1, 1);
        assert_eq!(timetable.due_count(99_999_999), 0);
        assert_eq!(timetable.due_count(100_000_000), 1);
    }
}
