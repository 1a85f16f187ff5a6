//! What this gateway has counted: commands, their time, errors, connections and bytes.
//!
//! Each thread that counts has a block of its own, which only it writes: counting is a plain load and store, no worker waits for another's
//! cache line. Readers add the blocks up. A reset moves the baseline that readers subtract.

use parking_lot::{Mutex, RwLock};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use vasto_proto::command::CommandSpec;
use vasto_proto::command::table::{Command, GATEWAY_ROWS, STORE_ROWS};

/// Rows of the command table.
pub const ROW_COUNT: usize = STORE_ROWS.len() + GATEWAY_ROWS.len();

/// The place of a command among all rows: the store's, then the gateway's.
pub fn row(command: Command) -> usize {
    match command {
        Command::Store(command) => command as usize,
        Command::Gateway(command) => STORE_ROWS.len() + command as usize,
    }
}

pub fn spec_of_row(row: usize) -> &'static CommandSpec {
    STORE_ROWS.get(row).unwrap_or_else(|| &GATEWAY_ROWS[row - STORE_ROWS.len()])
}

/// Bucket `n` of a command's latency counts those of less than 2^n µs; the last one has no end (above 33 s).
pub const LATENCY_BUCKETS: usize = 27;

fn latency_bucket(micros: u64) -> usize {
    ((u64::BITS - micros.leading_zeros()) as usize).min(LATENCY_BUCKETS - 1)
}

/// The code words that INFO errorstats tells apart: a closed set, so that no client can make it grow.
pub const ERROR_WORDS: &[&str] = &[
    "ERR",
    "WRONGTYPE",
    "EXECABORT",
    "CROSSSLOT",
    "CLUSTERDOWN",
    "UNKNOWN",
    "MISCONF",
    "TOOOLD",
    "NOPROTO",
    "WRONGPASS",
    "NOAUTH",
    "NOPERM",
    "OOM",
    "BUSY",
    "BUSYKEY",
    "LOADING",
    "READONLY",
    "TRYAGAIN",
    "NOREPLICAS",
    "other",
];

/// A counter that one thread writes and all may read.
#[derive(Debug, Default)]
struct Count(AtomicU64);

impl Count {
    fn add(&self, amount: u64) {
        // No read-modify-write: this thread is the only writer.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct CommandCounts {
    calls: Count,
    micros: Count,
    failed: Count,
    rejected: Count,
    latency: [Count; LATENCY_BUCKETS],
}

/// The counters of one thread.
#[derive(Debug)]
struct Block {
    commands: Box<[CommandCounts]>,
    errors: [Count; ERROR_WORDS.len()],
    connections_received: Count,
    connections_rejected: Count,
    input_bytes: Count,
    output_bytes: Count,
}

impl Block {
    fn new() -> Self {
        Self {
            commands: (0..ROW_COUNT).map(|_| CommandCounts::default()).collect(),
            errors: Default::default(),
            connections_received: Count::default(),
            connections_rejected: Count::default(),
            input_bytes: Count::default(),
            output_bytes: Count::default(),
        }
    }
}

/// The figures of one command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandFigures {
    /// How often it was executed, with or without success.
    pub calls: u64,
    pub micros: u64,
    /// Executed and answered an error.
    pub failed: u64,
    /// Refused before it was executed.
    pub rejected: u64,
    pub latency: [u64; LATENCY_BUCKETS],
}

impl CommandFigures {
    /// The upper end in microseconds of the bucket in which the percentile (0 to 100) lies.
    pub fn percentile_micros(&self, percentile: f64) -> u64 {
        let total: u64 = self.latency.iter().sum();
        let wanted = ((percentile / 100.0 * total as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let place = self.latency.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        1 << place.unwrap_or(LATENCY_BUCKETS - 1)
    }
}

/// All figures at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// By row.
    pub commands: Vec<CommandFigures>,
    /// By place in [`ERROR_WORDS`].
    pub errors: [u64; ERROR_WORDS.len()],
    pub connections_received: u64,
    pub connections_rejected: u64,
    pub input_bytes: u64,
    pub output_bytes: u64,
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            commands: vec![CommandFigures::default(); ROW_COUNT],
            errors: [0; ERROR_WORDS.len()],
            connections_received: 0,
            connections_rejected: 0,
            input_bytes: 0,
            output_bytes: 0,
        }
    }
}

impl Figures {
    pub fn commands_processed(&self) -> u64 {
        self.commands.iter().map(|figures| figures.calls).sum()
    }

    pub fn error_replies(&self) -> u64 {
        self.errors.iter().sum()
    }

    fn add(&mut self, block: &Block) {
        for (figures, counts) in self.commands.iter_mut().zip(&block.commands) {
            figures.calls += counts.calls.get();
            figures.micros += counts.micros.get();
            figures.failed += counts.failed.get();
            figures.rejected += counts.rejected.get();
            for (sum, count) in figures.latency.iter_mut().zip(&counts.latency) {
                *sum += count.get();
            }
        }
        for (sum, count) in self.errors.iter_mut().zip(&block.errors) {
            *sum += count.get();
        }
        self.connections_received += block.connections_received.get();
        self.connections_rejected += block.connections_rejected.get();
        self.input_bytes += block.input_bytes.get();
        self.output_bytes += block.output_bytes.get();
    }

    fn subtract(&mut self, baseline: &Figures) {
        for (figures, base) in self.commands.iter_mut().zip(&baseline.commands) {
            figures.calls -= base.calls;
            figures.micros -= base.micros;
            figures.failed -= base.failed;
            figures.rejected -= base.rejected;
            for (sum, base) in figures.latency.iter_mut().zip(&base.latency) {
                *sum -= base;
            }
        }
        for (sum, base) in self.errors.iter_mut().zip(&baseline.errors) {
            *sum -= base;
        }
        self.connections_received -= baseline.connections_received;
        self.connections_rejected -= baseline.connections_rejected;
        self.input_bytes -= baseline.input_bytes;
        self.output_bytes -= baseline.output_bytes;
    }
}

/// A moment of the running totals, for the rates of INFO.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    commands: u64,
    input_bytes: u64,
    output_bytes: u64,
}

/// Samples that a rate looks back on: with one every 250 ms, two seconds.
const SAMPLES: usize = 9;

/// What happens per second at present.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    pub commands: f64,
    pub input_bytes: f64,
    pub output_bytes: f64,
}

/// The counters of one gateway.
#[derive(Debug)]
pub struct Statistics {
    /// Tells the gateways of one process apart in the threads' own memory.
    id: u64,
    blocks: RwLock<Vec<Arc<Block>>>,
    baseline: RwLock<Option<Figures>>,
    samples: Mutex<VecDeque<Sample>>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// This thread's block of each gateway that it has counted for: one, but in tests.
    static OWN: RefCell<Vec<(u64, Arc<Block>)>> = const { RefCell::new(Vec::new()) };
}

impl Default for Statistics {
    fn default() -> Self {
        Self::new()
    }
}

impl Statistics {
    pub fn new() -> Self {
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            blocks: RwLock::default(),
            baseline: RwLock::default(),
            samples: Mutex::default(),
        }
    }

    fn with_block(&self, count: impl FnOnce(&Block)) {
        OWN.with_borrow_mut(|own| match own.iter().find(|(id, _)| *id == self.id) {
            Some((_, block)) => count(block),
            None => {
                let block = Arc::new(Block::new());
                self.blocks.write().push(Arc::clone(&block));
                count(&block);
                own.push((self.id, block));
            }
        });
    }

    /// A command was executed in `micros`; `failed` if it answered an error.
    pub fn command(&self, command: Command, micros: u64, failed: bool) {
        self.with_block(|block| {
            let counts = &block.commands[row(command)];
            counts.calls.add(1);
            counts.micros.add(micros);
            counts.latency[latency_bucket(micros)].add(1);
            if failed {
                counts.failed.add(1);
            }
        });
    }

    /// A command was refused before it was executed: wrong arity, inside or outside of a transaction.
    pub fn rejected(&self, command: Command) {
        self.with_block(|block| block.commands[row(command)].rejected.add(1));
    }

    /// An error was answered; `text` starts with its code word.
    pub fn error(&self, text: &[u8]) {
        let word = text.split(|byte| *byte == b' ').next().unwrap_or_default();
        let place = ERROR_WORDS.iter().position(|known| known.as_bytes() == word).unwrap_or(ERROR_WORDS.len() - 1);
        self.with_block(|block| block.errors[place].add(1));
    }

    pub fn connection_received(&self) {
        self.with_block(|block| block.connections_received.add(1));
    }

    /// A connection was closed because there were too many.
    pub fn connection_rejected(&self) {
        self.with_block(|block| block.connections_rejected.add(1));
    }

    pub fn input_bytes(&self, bytes: usize) {
        self.with_block(|block| block.input_bytes.add(bytes as u64));
    }

    pub fn output_bytes(&self, bytes: usize) {
        self.with_block(|block| block.output_bytes.add(bytes as u64));
    }

    fn running(&self) -> Figures {
        let mut figures = Figures::default();
        for block in self.blocks.read().iter() {
            figures.add(block);
        }
        figures
    }

    /// Since the start, or since the last [`Statistics::reset`].
    pub fn figures(&self) -> Figures {
        // The baseline's lock is held meanwhile: a reset in between would make the baseline the larger one.
        let baseline = self.baseline.read();
        let mut figures = self.running();
        if let Some(baseline) = &*baseline {
            figures.subtract(baseline);
        }
        figures
    }

    /// Since the start, whatever was reset: counters that are exported must never fall.
    pub fn figures_since_start(&self) -> Figures {
        self.running()
    }

    /// CONFIG RESETSTAT.
    pub fn reset(&self) {
        let mut baseline = self.baseline.write();
        *baseline = Some(self.running());
    }

    /// Notes the totals for [`Statistics::rates`]; called regularly.
    pub fn sample(&self) {
        let figures = self.running();
        let sample = Sample {
            at: Instant::now(),
            commands: figures.commands_processed(),
            input_bytes: figures.input_bytes,
            output_bytes: figures.output_bytes,
        };
        let mut samples = self.samples.lock();
        samples.push_back(sample);
        if samples.len() > SAMPLES {
            samples.pop_front();
        }
    }

    pub fn rates(&self) -> Rates {
        let samples = self.samples.lock();
        let (Some(first), Some(last)) = (samples.front(), samples.back()) else {
            return Rates::default();
        };
        let seconds = last.at.duration_since(first.at).as_secs_f64();
        if seconds <= 0.0 {
            return Rates::default();
        }
        let rate = |from: u64, to: u64| to.saturating_sub(from) as f64 / seconds;
        Rates {
            commands: rate(first.commands, last.commands),
            input_bytes: rate(first.input_bytes, last.input_bytes),
            output_bytes: rate(first.output_bytes, last.output_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::command::table::{GatewayCommand, StoreCommand};

    #[test]
    fn every_command_has_a_row_of_its_own() {
        let rows: Vec<usize> = Command::all().map(row).collect();
        assert!(rows.iter().copied().eq(0..ROW_COUNT));
        for command in Command::all() {
            assert_eq!(spec_of_row(row(command)).name, command.spec().name);
        }
    }

    #[test]
    fn threads_add_up_and_a_reset_starts_again() {
        let (statistics, other) = (Statistics::new(), Statistics::new());
        let get = Command::Store(StoreCommand::Get);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for micros in 0..1000 {
                        statistics.command(get, micros, micros % 10 == 0);
                        other.rejected(Command::Gateway(GatewayCommand::Ping));
                    }
                    statistics.error(b"ERR syntax error");
                    statistics.error(b"NOSUCHWORD x");
                });
            }
        });
        let figures = statistics.figures();
        let counts = figures.commands[row(get)];
        assert_eq!((counts.calls, counts.micros, counts.failed), (4000, 4 * 499_500, 400));
        assert_eq!(counts.latency.iter().sum::<u64>(), 4000);
        assert_eq!((figures.errors[0], figures.errors[ERROR_WORDS.len() - 1]), (4, 4));
        assert_eq!(other.figures().commands[row(Command::Gateway(GatewayCommand::Ping))].rejected, 4000);

        statistics.reset();
        assert_eq!(statistics.figures(), Figures::default());
        statistics.command(get, 5, false);
        assert_eq!(statistics.figures().commands_processed(), 1);
        assert_eq!(statistics.figures_since_start().commands_processed(), 4001);
    }

    #[test]
    fn percentiles_are_the_upper_ends_of_their_buckets() {
        let mut figures = CommandFigures::default();
        for micros in 1..=100 {
            figures.latency[latency_bucket(micros)] += 1;
        }
        for (percentile, micros) in [(0.0, 2), (50.0, 64), (99.0, 128), (100.0, 128)] {
            assert_eq!(figures.percentile_micros(percentile), micros, "p{percentile}");
        }
        assert_eq!(latency_bucket(0), 0);
        assert_eq!(latency_bucket(u64::MAX), LATENCY_BUCKETS - 1);
    }
}
