//! What a thread counts and times: answers, errors by their first word, latencies.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;

use super::command::Verb;

/// Latencies are kept in nanoseconds to 3 digits; what is longer than an hour counts as an hour.
const LATENCY_NS_MAX: u64 = 3_600_000_000_000;

/// Differences below 64 ns are below the cost of reading the clock.
const LATENCY_NS_MIN: u64 = 64;

/// Kinds of errors to tell apart; a server that puts changing words first may not fill the memory.
const ERROR_KINDS_MAX: usize = 64;

const OTHER_ERRORS: &str = "(other)";

#[derive(Debug)]
pub struct Timings {
    pub histogram: Histogram<u64>,
    /// Equal latencies in a row, which come when a batch is answered by one read: recorded as one.
    run_latency_ns: u64,
    run_length: u64,
}

impl Default for Timings {
    fn default() -> Self {
        let histogram =
            Histogram::new_with_bounds(LATENCY_NS_MIN, LATENCY_NS_MAX, 3).expect("the constant bounds are valid");
        Self { histogram, run_latency_ns: 0, run_length: 0 }
    }
}

impl Timings {
    pub fn record(&mut self, latency_ns: u64) {
        if latency_ns == self.run_latency_ns {
            self.run_length += 1;
        } else {
            self.flush();
            self.run_latency_ns = latency_ns;
            self.run_length = 1;
        }
    }

    pub fn flush(&mut self) {
        if self.run_length > 0 {
            self.histogram.saturating_record_n(self.run_latency_ns.min(LATENCY_NS_MAX), self.run_length);
            self.run_length = 0;
        }
    }

    fn merge(&mut self, mut other: Self) {
        self.flush();
        other.flush();
        self.histogram.add(&other.histogram).expect("all histograms have the same bounds");
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorKind {
    pub count: u64,
    /// The first one in full.
    pub example: String,
}

#[derive(Debug, Default)]
pub struct Tally {
    pub reads: Timings,
    pub writes: Timings,
    /// GETs that found nothing.
    pub misses: u64,
    pub errors: BTreeMap<String, ErrorKind>,
    /// Connections that ended before their time, by reason.
    pub lost_connections: BTreeMap<String, u64>,
    /// Commands that were sent and not answered because their connection was lost.
    pub lost_requests: u64,
    pub reconnects: u64,
    /// Clients that found no server any more.
    pub clients_given_up: u64,
    /// Commands of the timetable that were due and never sent.
    pub unsent: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub elapsed: Duration,
}

impl Tally {
    pub fn succeeded(&mut self, verb: Verb, latency_ns: u64) {
        match verb {
            Verb::Get => self.reads.record(latency_ns),
            Verb::Set | Verb::SetZero | Verb::Incr => self.writes.record(latency_ns),
        }
    }

    pub fn failed(&mut self, text: &[u8]) {
        let code = text.split(|byte| *byte == b' ').next().unwrap_or_default();
        let code = String::from_utf8_lossy(code);
        let known = self.errors.len() < ERROR_KINDS_MAX || self.errors.contains_key(code.as_ref());
        let code = if known { code.into_owned() } else { OTHER_ERRORS.to_owned() };
        let kind = self.errors.entry(code).or_default();
        if kind.count == 0 {
            kind.example = String::from_utf8_lossy(text).into_owned();
        }
        kind.count += 1;
    }

    pub fn answers(&self) -> u64 {
        self.reads.histogram.len() + self.writes.histogram.len()
    }

    /// Adds what another thread counted in the same time.
    pub fn merge(&mut self, other: Self) {
        self.reads.merge(other.reads);
        self.writes.merge(other.writes);
        self.misses += other.misses;
        for (code, kind) in other.errors {
            let sum = self.errors.entry(code).or_default();
            sum.count += kind.count;
            if sum.example.is_empty() {
                sum.example = kind.example;
            }
        }
        for (reason, count) in other.lost_connections {
            *self.lost_connections.entry(reason).or_default() += count;
        }
        self.lost_requests += other.lost_requests;
        self.reconnects += other.reconnects;
        self.clients_given_up += other.clients_given_up;
        self.unsent += other.unsent;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.elapsed = self.elapsed.max(other.elapsed);
    }
}

/// What the progress line shows while a thread is at work.
#[derive(Debug, Default)]
pub struct Progress {
    pub answers: AtomicU64,
    pub errors: AtomicU64,
    pub connections: AtomicU64,
}

impl Progress {
    pub fn read(counter: &AtomicU64) -> u64 {
        // Relaxed: the numbers are shown, nothing is decided by them.
        counter.load(Ordering::Relaxed)
    }

    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    pub fn subtract(counter: &AtomicU64, count: u64) {
        counter.fetch_sub(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_equal_latencies_count_each() {
        let mut tally = Tally::default();
        for latency_ns in [1000, 1000, 1000, 2_000_000, 1000] {
            tally.succeeded(Verb::Get, latency_ns);
        }
        let mut sum = Tally::default();
        sum.succeeded(Verb::Set, 5);
        sum.merge(tally);
        assert_eq!((sum.reads.histogram.len(), sum.writes.histogram.len()), (5, 1));
        let max = sum.reads.histogram.max();
        assert!((2_000_000..2_002_000).contains(&max), "{max}");
    }

    #[test]
    fn errors_are_told_apart_by_their_first_word() {
        let mut tally = Tally::default();
        tally.failed(b"ERR first");
        tally.failed(b"ERR second");
        tally.failed(b"OOM");
        assert_eq!(tally.errors["ERR"], ErrorKind { count: 2, example: "ERR first".into() });
        assert_eq!(tally.errors["OOM"].count, 1);
        for number in 0..1000 {
            tally.failed(format!("E{number}").as_bytes());
        }
        assert_eq!(tally.errors.len(), ERROR_KINDS_MAX + 1);
        assert_eq!(tally.errors.values().map(|kind| kind.count).sum::<u64>(), 1003);
    }
}
