//! The command line of `vasto bench`, and the checked settings it becomes.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;

use super::distribution::Distribution;
use super::value::ValueSize;

const REQUESTS_DEFAULT: u64 = 100_000;

/// More connections than this from one client address run out of local ports.
const CLIENTS_MAX: usize = 28_000;

/// Loads any server that speaks the Redis protocol and measures it.
///
/// Closed loop by default: each client sends a batch of --pipeline commands, waits for all answers, sends the next.
/// With --rate the commands have a timetable instead, and each latency counts from the moment its command was due, so
/// that a server that stalls cannot hide it (no coordinated omission).
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArguments {
    /// Host to connect to.
    #[arg(long, default_value = "127.0.0.1", help_heading = "Server")]
    host: String,

    /// Port to connect to.
    #[arg(long, short = 'p', default_value_t = 6379, help_heading = "Server")]
    port: u16,

    /// Address HOST:PORT instead of --host and --port; give it several times to spread the clients over several gateways.
    #[arg(long = "addr", value_name = "HOST:PORT", conflicts_with_all = ["host", "port", "unixsocket"], help_heading = "Server")]
    addresses: Vec<String>,

    /// Unix socket to connect to.
    #[arg(long, short = 's', value_name = "PATH", conflicts_with_all = ["host", "port"], help_heading = "Server")]
    unixsocket: Option<PathBuf>,

    /// RESP version to speak; 3 begins each connection with HELLO 3.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=3), help_heading = "Server")]
    protocol: u8,

    /// Database that each connection selects.
    #[arg(long, default_value_t = 0, help_heading = "Server")]
    database: u32,

    /// Seconds without an answer after which a connection counts as lost.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, help_heading = "Server")]
    timeout: f64,

    /// Seconds for which a lost connection is tried again before its client gives up.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, help_heading = "Server")]
    reconnect_for: f64,

    /// Parallel connections.
    #[arg(long, short = 'c', default_value_t = 50, help_heading = "Load")]
    clients: usize,

    /// Commands to send in all (default 100000, or no limit with --duration).
    #[arg(long, short = 'n', help_heading = "Load")]
    requests: Option<u64>,

    /// Seconds after which to stop.
    #[arg(long, value_name = "SECONDS", help_heading = "Load")]
    duration: Option<f64>,

    /// Commands in flight per connection.
    #[arg(long, short = 'P', default_value_t = 1, help_heading = "Load")]
    pipeline: usize,

    /// Commands per second in all, sent by a timetable (open loop); without it each client waits for its answers.
    #[arg(long, value_name = "OPS", help_heading = "Load")]
    rate: Option<f64>,

    /// Threads that drive the connections.
    #[arg(long, short = 't', default_value_t = 1, help_heading = "Load")]
    threads: usize,

    /// Which commands to send.
    #[arg(long, value_enum, help_heading = "Load")]
    workload: Option<WorkloadName>,

    /// Share of GETs in a mixed workload, 0 to 1 (default 0.5).
    #[arg(long, value_name = "RATIO", help_heading = "Load")]
    read_ratio: Option<f64>,

    /// Number of different keys.
    #[arg(long, short = 'k', default_value_t = 1_000_000, help_heading = "Keys and values")]
    keys: u64,

    /// What the name of each key begins with; the number of the key follows in 12 digits.
    #[arg(long, default_value = "key:", help_heading = "Keys and values")]
    key_prefix: String,

    /// Which keys the commands choose: uniform, zipfian, zipfian:EXPONENT (default 0.99), sequential.
    #[arg(long, default_value = "uniform", help_heading = "Keys and values")]
    distribution: Distribution,

    /// Bytes per value: a number or MIN-MAX.
    #[arg(long, short = 'd', value_name = "BYTES", default_value = "64", help_heading = "Keys and values")]
    value_size: ValueSize,

    /// Seed of all random choices and of the values (default: a new one, which is printed).
    #[arg(long, help_heading = "Keys and values")]
    seed: Option<u64>,

    /// First writes every key once, in order; with --requests 0 nothing else.
    #[arg(long, help_heading = "Keys and values")]
    load: bool,

    /// Remembers what the server acknowledged, reads it all back afterwards and fails when anything is lost or wrong.
    ///
    /// Each key is then written by one connection only, answers to GET are checked too, and a key whose write has an
    /// unknown outcome (the connection was lost) is not written again: what it may hold afterwards stays known.
    #[arg(long, help_heading = "Verification")]
    verify: bool,

    /// Writes what the server acknowledged to this file.
    #[arg(long, value_name = "FILE", help_heading = "Verification")]
    ledger: Option<PathBuf>,

    /// Sends no load: reads back what this ledger says was acknowledged, and fails when anything is lost or wrong.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["load", "verify", "ledger", "requests", "duration"], help_heading = "Verification")]
    check: Option<PathBuf>,

    /// Prints the result as one JSON object.
    #[arg(long, help_heading = "Output")]
    json: bool,

    /// Shows no progress line (it is shown each second when the error output is a terminal).
    #[arg(long, short = 'q', help_heading = "Output")]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WorkloadName {
    /// SET only.
    Set,
    /// GET only.
    Get,
    /// GET and SET, see --read-ratio.
    Mixed,
    /// INCR only.
    Incr,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Workload {
    Set,
    Get,
    Mixed { read_ratio: f64 },
    Incr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Tcp(String),
    Unix(PathBuf),
}

impl std::fmt::Display for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => formatter.write_str(address),
            Self::Unix(path) => write!(formatter, "{}", path.display()),
        }
    }
}

/// How to reach the server and how to behave on a connection.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    pub targets: Vec<Target>,
    pub protocol: u8,
    pub database: u32,
    pub timeout: Duration,
    pub reconnect_for: Duration,
}

/// What `vasto bench` shall do, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    pub server: ServerSettings,
    pub clients: usize,
    pub threads: usize,
    pub requests: Option<u64>,
    pub duration: Option<Duration>,
    pub pipeline: usize,
    pub rate: Option<f64>,
    pub workload: Workload,
    pub keys: u64,
    pub key_prefix: String,
    pub distribution: Distribution,
    pub value_size: ValueSize,
    pub seed: u64,
    pub load: bool,
    pub verify: bool,
    pub ledger: Option<PathBuf>,
    pub check: Option<PathBuf>,
    pub json: bool,
    pub quiet: bool,
}

impl Settings {
    /// Whether the acknowledged writes are remembered.
    pub fn keeps_ledger(&self) -> bool {
        self.verify || self.ledger.is_some()
    }

    /// Whether anything is sent beside the load of all keys.
    pub fn runs_workload(&self) -> bool {
        self.requests != Some(0)
    }
}

impl BenchArguments {
    pub fn settings(self) -> anyhow::Result<Settings> {
        let workload = match (self.workload, self.read_ratio) {
            (Some(WorkloadName::Set), None) => Workload::Set,
            (Some(WorkloadName::Get), None) => Workload::Get,
            (Some(WorkloadName::Incr), None) => Workload::Incr,
            (Some(WorkloadName::Mixed) | None, ratio) => {
                let read_ratio = ratio.unwrap_or(0.5);
                ensure!((0.0..=1.0).contains(&read_ratio), "--read-ratio must lie between 0 and 1");
                Workload::Mixed { read_ratio }
            }
            (Some(_), Some(_)) => bail!("--read-ratio belongs to --workload mixed"),
        };
        let targets = if let Some(path) = self.unixsocket {
            vec![Target::Unix(path)]
        } else if self.addresses.is_empty() {
            vec![Target::Tcp(tcp_address(&self.host, self.port))]
        } else {
            self.addresses.into_iter().map(Target::Tcp).collect()
        };
        ensure!((1..=CLIENTS_MAX).contains(&self.clients), "--clients must lie between 1 and {CLIENTS_MAX}");
        ensure!((1..=self.clients).contains(&self.threads), "--threads must lie between 1 and the number of clients");
        ensure!(self.pipeline >= 1, "--pipeline must be at least 1");
        ensure!(self.keys >= 1, "--keys must be at least 1");
        ensure!(self.key_prefix.len() <= 32 * 1024, "--key-prefix is longer than 32 KiB");
        if let Some(rate) = self.rate {
            ensure!(rate.is_finite() && rate >= 0.001, "--rate must be at least 0.001");
        }
        let keeps_ledger = self.verify || self.ledger.is_some();
        if keeps_ledger {
            ensure!(
                self.keys >= self.clients as u64,
                "with --verify or --ledger each client writes keys of its own: --keys must be at least --clients"
            );
            ensure!(
                workload == Workload::Incr || self.value_size.min() >= ValueSize::DISTINCT_MIN,
                "with --verify or --ledger a value must have {} bytes or more, to be told from older ones",
                ValueSize::DISTINCT_MIN
            );
        }
        Ok(Settings {
            server: ServerSettings {
                targets,
                protocol: self.protocol,
                database: self.database,
                timeout: seconds(self.timeout).context("--timeout")?,
                reconnect_for: seconds(self.reconnect_for).context("--reconnect-for")?,
            },
            clients: self.clients,
            threads: self.threads,
            requests: match (self.requests, self.duration) {
                (None, None) => Some(REQUESTS_DEFAULT),
                (requests, _) => requests,
            },
            duration: self.duration.map(seconds).transpose().context("--duration")?,
            pipeline: self.pipeline,
            rate: self.rate,
            workload,
            keys: self.keys,
            key_prefix: self.key_prefix,
            distribution: self.distribution,
            value_size: self.value_size,
            seed: self.seed.unwrap_or_else(|| fastrand::u64(..)),
            // A counter is only known when it started from a known number.
            load: self.load || (keeps_ledger && workload == Workload::Incr),
            verify: self.verify,
            ledger: self.ledger,
            check: self.check,
            json: self.json,
            quiet: self.quiet,
        })
    }
}

fn tcp_address(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn seconds(number: f64) -> anyhow::Result<Duration> {
    let duration = Duration::try_from_secs_f64(number)?;
    ensure!(!duration.is_zero() && number < 1e9, "must be more than 0 and less than 1e9 seconds");
    Ok(duration)
}

#[cfg(test)]
mod tests {

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArguments,
    }

    fn settings(line: &str) -> anyhow::Result<Settings> {
        let words = std::iter::once("bench").chain(line.split_whitespace());
        <Line as clap::Parser>::try_parse_from(words)?.bench.settings()
    }

    #[test]
    fn defaults_are_those_of_the_help() {
        let settings = settings("").unwrap();
        assert_eq!(settings.server.targets, [Target::Tcp("127.0.0.1:6379".into())]);
        assert_eq!((settings.clients, settings.threads, settings.pipeline), (50, 1, 1));
        assert_eq!(settings.requests, Some(REQUESTS_DEFAULT));
        assert_eq!(settings.workload, Workload::Mixed { read_ratio: 0.5 });
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "--workload get --read-ratio 0.5",
            "--read-ratio 1.5",
            "--addr a:1 --port 2",
            "--clients 0",
            "--threads 51",
            "--verify --value-size 4",
            "--verify --keys 10",
            "--duration 0",
            "--rate 0",
            "--value-size 20-10",
            "--check x --load",
            "--distribution pareto",
        ] {
            assert!(settings(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_duration_lifts_the_limit_of_requests() {
        assert_eq!(settings("--duration 1.5").unwrap().requests, None);
        assert_eq!(settings("--duration 1.5 -n 7").unwrap().requests, Some(7));
        assert!(!settings("--load -n 0").unwrap().runs_workload());
    }

    #[test]
    fn counters_are_loaded_before_they_are_verified() {
        assert!(settings("--workload incr --verify").unwrap().load);
        assert!(!settings("--workload incr").unwrap().load);
    }
}
