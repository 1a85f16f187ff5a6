//! `vasto bench`: a load generator for any server that speaks the Redis protocol, which can check what it wrote.
//!
//! From the outside in: `arguments` become settings; a `phase` runs threads, each with its own runtime and no lock; a
//! `connection` asks its `traffic` for requests, which `command` writes and `reply` reads; `value` makes every value a
//! function of key and version, so that the `ledger` judges by numbers alone; `tally` and `report` count and tell.

mod arguments;
pub mod command;
pub mod connection;
mod distribution;
mod ledger;
mod phase;
pub mod reply;
mod report;
mod tally;
mod timetable;
mod traffic;
mod value;

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

pub use self::arguments::{BenchArguments, ServerSettings, Target};
use self::arguments::{Settings, Workload};
use self::command::Encoder;
use self::ledger::{Entry, Header, Ledger, Partition};
use self::phase::Phase;
use self::report::{PhaseSummary, Report, VerificationSummary};
use self::tally::Tally;
use self::traffic::{Audit, Load, Mix, ReadBack, Records, Traffic, Violations};
use self::value::Values;

/// The load and the reading back are not measured, so they go in deep batches, whatever the measured pipeline is.
const BATCH_MIN: usize = 32;

/// Between a failed request of the load or the reading back and its repetition.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(10);

/// Exit status when something acknowledged is lost or wrong; 1 means that the benchmark could not run.
const EXIT_VERIFICATION_FAILED: u8 = 3;

/// Runs the benchmark. Must not be called from within a runtime, since each thread of the load makes its own.
pub fn run(arguments: BenchArguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.settings()?;
    require_server(&settings.server)?;
    let report = match &settings.check {
        Some(path) => check(&settings, path)?,
        None => measure(&settings)?,
    };
    let mut output = std::io::stdout().lock();
    if settings.json {
        report.write_json(&mut output)?
    } else {
        report.write_table(&mut output)?
    }
    if report.verification.as_ref().is_some_and(|verification| !verification.clean) {
        return Ok(ExitCode::from(EXIT_VERIFICATION_FAILED));
    }
    ensure!(report.keys_not_loaded == 0, "not all keys could be loaded");
    for phase in &report.phases {
        ensure!(phase.clients_given_up == 0, "the server went away");
        ensure!(phase.answers > 0 || phase.errors.is_empty(), "every answer was an error");
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails early and clearly when no server answers.
fn require_server(server: &ServerSettings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let mut reasons = Vec::new();
    for target in &server.targets {
        match runtime.block_on(connection::connect(server, target)) {
            Ok(_) => return Ok(()),
            Err(error) => reasons.push(format!("{target}: {error:#}")),
        }
    }
    bail!("no server can be reached ({})", reasons.join("; "))
}

/// Load, workload and reading back, as far as they are wanted.
fn measure(settings: &Settings) -> anyhow::Result<Report> {
    let values = Values { seed: settings.seed, size: settings.value_size };
    let runner = Runner {
        settings,
        encoder: Encoder::new(&settings.key_prefix, settings.keys, values),
        stop: Arc::new(AtomicBool::new(false)),
    };
    let mut report = Report::new(settings);
    let partitions: Vec<Partition> = (0..settings.threads as u64)
        .map(|thread| Partition {
            keys: settings.keys,
            connections: settings.clients as u64,
            threads: settings.threads as u64,
            thread,
        })
        .collect();
    let mut records: Vec<Option<Records>> =
        partitions.iter().map(|partition| settings.keeps_ledger().then(|| Records::new(*partition))).collect();

    if settings.load {
        let loads = partitions.iter().zip(records).map(|(partition, records)| Load::new(settings, *partition, records));
        let (summary, loads) = runner.run("load", Some(settings.keys), loads.collect(), Depth::Batches)?;
        report.phases.push(summary);
        records = Vec::new();
        for load in loads {
            let (missing, part) = load.finish();
            report.keys_not_loaded += missing;
            records.push(part);
        }
    }
    let mut violations = Violations::default();
    if settings.runs_workload() && !runner.is_stopped() {
        let mixes = partitions
            .iter()
            .zip(records)
            .map(|(partition, records)| Mix::new(settings, values, *partition, records))
            .collect();
        let (summary, mixes) = runner.run(report.workload, settings.requests, mixes, Depth::Measured)?;
        report.phases.push(summary);
        records = Vec::new();
        for mix in mixes {
            let (found, part) = mix.finish();
            violations.stale += found.stale;
            violations.wrong += found.wrong;
            records.push(part);
        }
    }
    if settings.keeps_ledger() {
        let ledger = ledger_of(settings, records);
        if let Some(path) = &settings.ledger {
            write_ledger(&ledger, path).with_context(|| format!("write ledger {}", path.display()))?;
        }
        if settings.verify {
            // Ctrl-C ended the load; what it wrote can be verified all the same.
            runner.stop.store(false, Ordering::Relaxed);
            let audit = runner.read_back(ledger, values, &mut report)?;
            report.verification = Some(VerificationSummary::new(&audit, violations, &runner.encoder));
        }
    }
    Ok(report)
}

/// Reads back what an earlier run was told to be written.
fn check(settings: &Settings, path: &Path) -> anyhow::Result<Report> {
    let file = File::open(path).with_context(|| format!("open ledger {}", path.display()))?;
    let ledger = Ledger::read(BufReader::new(file)).with_context(|| format!("read ledger {}", path.display()))?;
    let header = &ledger.header;
    ensure!(header.keys > 0, "the ledger is about no keys");
    let value_size = header.value_size.parse().map_err(anyhow::Error::msg).context("value size in the ledger")?;
    let values = Values { seed: header.seed, size: value_size };
    let settings = Settings {
        keys: header.keys,
        key_prefix: header.key_prefix.clone(),
        value_size,
        seed: header.seed,
        workload: if header.counters { Workload::Incr } else { settings.workload },
        ..settings.clone()
    };
    let runner = Runner {
        settings: &settings,
        encoder: Encoder::new(&settings.key_prefix, settings.keys, values),
        stop: Arc::new(AtomicBool::new(false)),
    };
    let mut report = Report::new(&settings);
    let audit = runner.read_back(ledger, values, &mut report)?;
    report.verification = Some(VerificationSummary::new(&audit, Violations::default(), &runner.encoder));
    Ok(report)
}

fn ledger_of(settings: &Settings, records: Vec<Option<Records>>) -> Ledger {
    let mut entries: Vec<(u64, Entry)> = Vec::new();
    for Records { partition, entries: part } in records.into_iter().flatten() {
        let written = (0..).zip(part).filter(|(_, entry)| entry.sent > 0);
        entries.extend(written.map(|(index, entry)| (partition.key_at(index), entry)));
    }
    entries.sort_unstable_by_key(|(key, _)| *key);
    let header = Header {
        seed: settings.seed,
        keys: settings.keys,
        key_prefix: settings.key_prefix.clone(),
        value_size: settings.value_size.to_string(),
        counters: settings.workload == Workload::Incr,
    };
    Ledger { header, entries }
}

/// Writes beside the file and renames, so that a ledger is whole or not there.
fn write_ledger(ledger: &Ledger, path: &Path) -> anyhow::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let mut output = BufWriter::new(File::create(&unfinished)?);
    ledger.write(&mut output)?;
    std::fs::rename(&unfinished, path)?;
    Ok(())
}

/// How deep the batches of a phase are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// As the user asked: the phase is measured.
    Measured,
    /// Deep, closed loop, failures are repeated: the phase shall get done.
    Batches,
}

struct Runner<'a> {
    settings: &'a Settings,
    encoder: Encoder,
    stop: Arc<AtomicBool>,
}

impl Runner<'_> {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn run<T: Traffic + Send + 'static>(
        &self,
        name: &'static str,
        requests: Option<u64>,
        traffics: Vec<T>,
        depth: Depth,
    ) -> anyhow::Result<(PhaseSummary, Vec<T>)> {
        let settings = self.settings;
        let phase = Phase {
            name,
            server: settings.server.clone(),
            encoder: self.encoder.clone(),
            clients: settings.clients,
            threads: settings.threads,
            pipeline: if depth == Depth::Measured { settings.pipeline } else { settings.pipeline.max(BATCH_MIN) },
            rate: if depth == Depth::Measured { settings.rate } else { None },
            duration: if depth == Depth::Measured { settings.duration } else { None },
            requests,
            pause_after_failure: if depth == Depth::Measured { None } else { Some(PAUSE_AFTER_FAILURE) },
            shows_progress: !settings.quiet,
        };
        let cpu_before = own_cpu_seconds();
        let (tally, traffics): (Tally, Vec<T>) = phase.run(traffics, &self.stop)?;
        let cpu_seconds = own_cpu_seconds().zip(cpu_before).map(|(after, before)| after - before);
        Ok((PhaseSummary::new(name, tally, cpu_seconds), traffics))
    }

    fn read_back(&self, ledger: Ledger, values: Values, report: &mut Report) -> anyhow::Result<Audit> {
        let counters = ledger.header.counters;
        let count = ledger.entries.len();
        let mut parts = vec![Vec::new(); self.settings.threads];
        for (index, entry) in ledger.entries.into_iter().enumerate() {
            parts[index % self.settings.threads].push(entry);
        }
        let patience = self.settings.server.timeout;
        let backs = parts.into_iter().map(|part| ReadBack::new(part, values, counters, patience)).collect();
        let (summary, backs) = self.run("read back", Some(count as u64), backs, Depth::Batches)?;
        report.phases.push(summary);
        let mut audit = Audit::default();
        for back in backs {
            audit.merge(back.finish());
        }
        Ok(audit)
    }
}

/// User and system time of this process, from the system's table; `None` where there is none.
fn own_cpu_seconds() -> Option<f64> {
    /// `USER_HZ`, which Linux fixes at 100 on all common machines.
    const TICKS_PER_SECOND: f64 = 100.0;
    let line = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold spaces; behind it come the fields from the third on.
    let (_, fields) = line.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {

    use std::collections::HashMap;
    use std::io::{BufRead, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU64;

    use clap::Parser;

    use super::*;

    /// How the server of a test misbehaves: every so many commands.
    #[derive(Clone, Copy, Default)]
    struct Faults {
        /// Executes the command and closes the connection instead of answering.
        hang_up_every: Option<u64>,
        /// Answers and forgets a SET.
        forget_every: Option<u64>,
        /// Answers nothing any more on this connection.
        fall_silent_every: Option<u64>,
    }

    #[derive(Default)]
    struct Server {
        data: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
        commands: AtomicU64,
        faults: Faults,
    }

    impl Server {
        /// Serves on a port of its own until the test process ends.
        fn start(faults: Faults) -> String {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let server = Arc::new(Self { faults, ..Self::default() });
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let server = Arc::clone(&server);
                    std::thread::spawn(move || server.serve(stream.unwrap()));
                }
            });
            address
        }

        fn serve(&self, stream: TcpStream) -> Option<()> {
            stream.set_nodelay(true).unwrap();
            let mut output = stream.try_clone().unwrap();
            let mut input = BufReader::new(stream);
            let mut silent = false;
            loop {
                let words = read_command(&mut input)?;
                let number = self.commands.fetch_add(1, Ordering::Relaxed) + 1;
                let now = |every: Option<u64>| every.is_some_and(|every| number.is_multiple_of(every));
                let answer = self.execute(&words, now(self.faults.forget_every));
                if now(self.faults.hang_up_every) {
                    return None;
                }
                silent |= now(self.faults.fall_silent_every);
                if !silent {
                    output.write_all(&answer).ok()?;
                }
            }
        }

        fn execute(&self, words: &[Vec<u8>], forgets: bool) -> Vec<u8> {
            let mut data = self.data.lock().unwrap();
            match words {
                [name, key] if name == b"GET" => match data.get(key) {
                    Some(value) => [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat(),
                    None => b"$-1\r\n".to_vec(),
                },
                [name, key, value] if name == b"SET" => {
                    if !forgets {
                        data.insert(key.clone(), value.clone());
                    }
                    b"+OK\r\n".to_vec()
                }
                [name, key] if name == b"INCR" => {
                    let value = data.entry(key.clone()).or_default();
                    let number = reply::integer(value).unwrap_or(0) + 1;
                    *value = number.to_string().into_bytes();
                    format!(":{number}\r\n").into_bytes()
                }
                [name, ..] if name == b"HELLO" => b"%1\r\n+proto\r\n:3\r\n".to_vec(),
                _ => b"-ERR unknown command\r\n".to_vec(),
            }
        }
    }

    fn read_command(input: &mut impl BufRead) -> Option<Vec<Vec<u8>>> {
        let number = |input: &mut dyn BufRead| -> Option<usize> {
            let mut line = String::new();
            input.read_line(&mut line).ok()?;
            line.get(1..)?.trim().parse().ok()
        };
        let count = number(input)?;
        (0..count)
            .map(|_| {
                let mut word = vec![0; number(input)? + 2];
                input.read_exact(&mut word).ok()?;
                word.truncate(word.len() - 2);
                Some(word)
            })
            .collect()
    }

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArguments,
    }

    fn settings(address: &str, line: &str) -> Settings {
        let words = ["bench", "--addr", address, "--quiet"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).unwrap().bench.settings().unwrap()
    }

    fn report(faults: Faults, line: &str) -> Report {
        measure(&settings(&Server::start(faults), line)).unwrap()
    }

    #[test]
    fn every_kind_of_load_is_answered_and_verified() {
        for line in [
            "-n 5000 --keys 500 --load --verify --clients 5",
            "-n 5000 --keys 500 --verify --clients 5 --threads 2 --pipeline 16 --workload set --value-size 8-3000",
            "-n 5000 --keys 500 --verify --clients 5 --workload incr --protocol 3",
            "-n 500 --keys 500 --verify --clients 5 --rate 5000 --threads 2",
        ] {
            let report = report(Faults::default(), line);
            let requests = if line.starts_with("-n 500 ") { 500 } else { 5000 };
            let measured = report.phases.iter().find(|phase| phase.name == report.workload).unwrap();
            assert_eq!(measured.answers, requests, "{line}");
            let verification = report.verification.unwrap();
            assert!(verification.clean && verification.unknown == 0, "{line}: {verification:?}");
        }
    }

    #[test]
    fn lost_connections_leave_some_outcomes_unknown_and_lose_nothing() {
        for line in ["--workload mixed", "--workload incr"] {
            let faults = Faults { hang_up_every: Some(200), ..Faults::default() };
            let report =
                report(faults, &format!("{line} -n 5000 --keys 5000 --load --verify --clients 5 --pipeline 4"));
            let measured = &report.phases[1];
            assert!(measured.lost_requests > 0 && measured.reconnects > 0, "{line}: {measured:?}");
            let verification = report.verification.unwrap();
            assert!(verification.clean, "{line}: {verification:?}");
        }
    }

    /// Keys that were under way when the traffic had no more were not read again.
    #[test]
    fn a_connection_that_is_lost_in_its_last_batch_reads_it_again() {
        // 18 keys are loaded, written and read: the last batch of each has 2, and the server hangs up in it for some of these.
        for every in 19..70 {
            let faults = Faults { hang_up_every: Some(every), ..Faults::default() };
            let line =
                "--workload set --distribution sequential -n 18 --keys 18 --load --verify --clients 1 --pipeline 4";
            let verification = report(faults, line).verification.unwrap();
            assert!(verification.clean, "hangs up every {every}: {verification:?}");
        }
    }

    #[test]
    fn a_silent_server_is_given_up_after_the_timeout() {
        let faults = Faults { fall_silent_every: Some(300), ..Faults::default() };
        let report = report(faults, "-n 1000 --keys 100 --clients 5 --timeout 0.1");
        let measured = &report.phases[0];
        assert!(measured.lost_connections["timeout"] > 0, "{measured:?}");
        assert_eq!(measured.answers + measured.lost_requests, 1000);
    }

    #[test]
    fn a_forgetful_server_is_found_out_at_once_and_by_the_ledger_later() {
        let folder = std::env::temp_dir().join(format!("vasto-bench-test-{}", std::process::id()));
        let file = folder.to_str().unwrap();
        let faults = Faults { forget_every: Some(100), ..Faults::default() };
        let address = Server::start(faults);
        let line = format!("-n 5000 --keys 5000 --workload set --distribution sequential --verify --ledger {file}");
        let now = measure(&settings(&address, &line)).unwrap().verification.unwrap();
        assert!(now.lost > 0 && !now.clean, "{now:?}");
        let later = settings(&address, &format!("--check {file}"));
        let later = check(&later, &folder).unwrap().verification.unwrap();
        assert_eq!(later.findings.len(), now.findings.len());
        assert_eq!((later.kept, later.lost, later.wrong), (now.kept, now.lost, now.wrong));
        std::fs::remove_file(folder).unwrap();
    }

    #[test]
    fn a_server_that_is_not_there_is_an_error() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let error = require_server(&settings(&address, "").server).unwrap_err();
        assert!(error.to_string().contains(&address), "{error}");
    }
}
