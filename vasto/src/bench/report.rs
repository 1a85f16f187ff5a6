//! The result as a table for people and as JSON for programs.

use std::collections::BTreeMap;
use std::io::{self, Write};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::arguments::{Settings, Workload};
use super::command::Encoder;
use super::ledger::Verdict;
use super::tally::Tally;
use super::traffic::{Audit, Finding, Violations};

#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    pub answers: u64,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
}

impl Latency {
    /// `None` when nothing was answered.
    fn of(histogram: &Histogram<u64>) -> Option<Self> {
        // To the microsecond: the histogram keeps no more.
        let ms = |ns: f64| (ns / 1e3).round() / 1e3;
        let quantile = |quantile| ms(histogram.value_at_quantile(quantile) as f64);
        (!histogram.is_empty()).then(|| Self {
            answers: histogram.len(),
            mean_ms: ms(histogram.mean()),
            p50_ms: quantile(0.5),
            p90_ms: quantile(0.9),
            p99_ms: quantile(0.99),
            p999_ms: quantile(0.999),
            max_ms: ms(histogram.max() as f64),
        })
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct ErrorSummary {
    pub count: u64,
    pub example: String,
}

/// The figures of one phase.
#[derive(Clone, Debug, Serialize)]
pub struct PhaseSummary {
    pub name: &'static str,
    pub seconds: f64,
    /// Answers that are no errors.
    pub answers: u64,
    pub ops_per_second: f64,
    pub sent_mb_per_second: f64,
    pub received_mb_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reads: Option<Latency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writes: Option<Latency>,
    pub misses: u64,
    pub errors: BTreeMap<String, ErrorSummary>,
    pub lost_connections: BTreeMap<String, u64>,
    pub lost_requests: u64,
    pub reconnects: u64,
    pub clients_given_up: u64,
    pub unsent: u64,
    /// CPU time of the load generator itself, where the system tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator_cpu_seconds: Option<f64>,
}

impl PhaseSummary {
    pub fn new(name: &'static str, mut tally: Tally, generator_cpu_seconds: Option<f64>) -> Self {
        tally.reads.flush();
        tally.writes.flush();
        let seconds = tally.elapsed.as_secs_f64().max(1e-9);
        let answers = tally.answers();
        Self {
            name,
            seconds,
            answers,
            ops_per_second: answers as f64 / seconds,
            sent_mb_per_second: tally.bytes_sent as f64 / 1e6 / seconds,
            received_mb_per_second: tally.bytes_received as f64 / 1e6 / seconds,
            reads: Latency::of(&tally.reads.histogram),
            writes: Latency::of(&tally.writes.histogram),
            misses: tally.misses,
            errors: tally
                .errors
                .into_iter()
                .map(|(code, kind)| (code, ErrorSummary { count: kind.count, example: kind.example }))
                .collect(),
            lost_connections: tally.lost_connections,
            lost_requests: tally.lost_requests,
            reconnects: tally.reconnects,
            clients_given_up: tally.clients_given_up,
            unsent: tally.unsent,
            generator_cpu_seconds,
        }
    }

    fn error_count(&self) -> u64 {
        self.errors.values().map(|error| error.count).sum()
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct VerificationSummary {
    pub kept: u64,
    /// Keys whose last write has an unknown outcome, or nothing acknowledged: both contents are right.
    pub unknown: u64,
    pub lost: u64,
    pub wrong: u64,
    pub unread: u64,
    /// Answers during the run that were older than what was acknowledged.
    pub stale_answers: u64,
    pub wrong_answers: u64,
    pub findings: Vec<String>,
    pub clean: bool,
}

impl VerificationSummary {
    pub fn new(audit: &Audit, violations: Violations, encoder: &Encoder) -> Self {
        Self {
            kept: audit.kept,
            unknown: audit.open,
            lost: audit.lost,
            wrong: audit.wrong,
            unread: audit.unread,
            stale_answers: violations.stale,
            wrong_answers: violations.wrong,
            findings: audit.findings.iter().map(|finding| describe(finding, encoder)).collect(),
            clean: audit.is_clean() && violations == Violations::default(),
        }
    }
}

fn describe(finding: &Finding, encoder: &Encoder) -> String {
    let what = match finding.verdict {
        Verdict::Lost => "lost",
        Verdict::Wrong => "wrong",
        Verdict::Kept | Verdict::Open => "right",
    };
    let found = match &finding.found {
        Some(bytes) => format!("\"{}\"", bytes.escape_ascii()),
        None => "nothing".into(),
    };
    let entry = &finding.entry;
    format!(
        "{what}: {} holds {found}; acknowledged version {} of {} sent, {} of unknown outcome",
        encoder.key_name(finding.key),
        entry.acknowledged,
        entry.sent,
        entry.unknown,
    )
}

/// All that a run of `vasto bench` found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub servers: Vec<String>,
    pub clients: usize,
    pub threads: usize,
    pub pipeline: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    pub workload: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_ratio: Option<f64>,
    pub keys: u64,
    pub distribution: String,
    pub value_size: String,
    pub seed: u64,
    pub phases: Vec<PhaseSummary>,
    /// Keys that the load could not write.
    pub keys_not_loaded: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verification: Option<VerificationSummary>,
}

impl Report {
    pub fn new(settings: &Settings) -> Self {
        let (workload, read_ratio) = match settings.workload {
            Workload::Set => ("set", None),
            Workload::Get => ("get", None),
            Workload::Mixed { read_ratio } => ("mixed", Some(read_ratio)),
            Workload::Incr => ("incr", None),
        };
        Self {
            servers: settings.server.targets.iter().map(ToString::to_string).collect(),
            clients: settings.clients,
            threads: settings.threads,
            pipeline: settings.pipeline,
            rate: settings.rate,
            workload,
            read_ratio,
            keys: settings.keys,
            distribution: settings.distribution.to_string(),
            value_size: settings.value_size.to_string(),
            seed: settings.seed,
            phases: Vec::new(),
            keys_not_loaded: 0,
            verification: None,
        }
    }

    pub fn write_json(&self, output: &mut impl Write) -> anyhow::Result<()> {
        serde_json::to_writer(&mut *output, self)?;
        writeln!(output)?;
        Ok(())
    }

    pub fn write_table(&self, output: &mut impl Write) -> io::Result<()> {
        let Self { clients, threads, pipeline, keys, distribution, value_size, seed, .. } = self;
        writeln!(output, "server    {}", self.servers.join(" "))?;
        write!(output, "load      {}", self.workload)?;
        if let Some(read_ratio) = self.read_ratio {
            write!(output, " with {:.0} % GET", read_ratio * 100.0)?;
        }
        write!(output, ", {clients} clients, {threads} threads, pipeline {pipeline}, ")?;
        match self.rate {
            Some(rate) => writeln!(output, "{rate} ops/s by timetable (latency from the moment due)")?,
            None => writeln!(output, "closed loop")?,
        }
        writeln!(output, "keys      {keys}, {distribution}, values of {value_size} bytes, seed {seed}")?;
        if self.phases.iter().any(|phase| phase.answers > 0) {
            writeln!(output)?;
            writeln!(
                output,
                "{:9} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
                "", "answers", "ops/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "seconds"
            )?;
        }
        for phase in &self.phases {
            write_phase(phase, output)?;
        }
        if self.keys_not_loaded > 0 {
            writeln!(output, "\nload incomplete: {} keys could not be written", self.keys_not_loaded)?;
        }
        if let Some(verification) = &self.verification {
            write_verification(verification, output)?;
        }
        Ok(())
    }
}

fn write_phase(phase: &PhaseSummary, output: &mut impl Write) -> io::Result<()> {
    let both = phase.reads.is_some() && phase.writes.is_some();
    let rows = [(&phase.reads, " GET"), (&phase.writes, if phase.name == "incr" { " INCR" } else { " SET" })];
    for (latency, suffix) in rows {
        let Some(latency) = latency else { continue };
        writeln!(
            output,
            "{:9} {:>11} {:>9.0} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.2}",
            if both { format!("{}{suffix}", phase.name) } else { phase.name.to_owned() },
            latency.answers,
            latency.answers as f64 / phase.seconds,
            latency.p50_ms,
            latency.p99_ms,
            latency.p999_ms,
            latency.max_ms,
            phase.seconds,
        )?;
    }
    write!(
        output,
        "          {:.1} MB/s sent, {:.1} MB/s received, {} errors",
        phase.sent_mb_per_second,
        phase.received_mb_per_second,
        phase.error_count()
    )?;
    for (count, what) in [
        (phase.misses, "GETs of missing keys"),
        (phase.lost_requests, "commands lost with their connection"),
        (phase.reconnects, "reconnects"),
        (phase.clients_given_up, "clients gave up"),
        (phase.unsent, "due and never sent"),
    ] {
        if count > 0 {
            write!(output, ", {count} {what}")?;
        }
    }
    if let Some(seconds) = phase.generator_cpu_seconds {
        write!(output, ", {seconds:.2} s CPU here")?;
    }
    writeln!(output)?;
    for (code, error) in &phase.errors {
        writeln!(output, "          error {code}: {} ({})", error.count, error.example)?;
    }
    for (reason, count) in &phase.lost_connections {
        writeln!(output, "          connection lost, {reason}: {count}")?;
    }
    Ok(())
}

fn write_verification(verification: &VerificationSummary, output: &mut impl Write) -> io::Result<()> {
    let VerificationSummary { kept, unknown, lost, wrong, unread, stale_answers, wrong_answers, findings, clean } =
        verification;
    writeln!(output)?;
    writeln!(
        output,
        "verified  {kept} kept, {unknown} unknown, {lost} lost, {wrong} wrong, {unread} could not be read"
    )?;
    writeln!(output, "          answers during the run: {stale_answers} stale, {wrong_answers} wrong")?;
    for finding in findings {
        writeln!(output, "          {finding}")?;
    }
    let verdict = if *clean { "everything acknowledged is there" } else { "FAILED" };
    writeln!(output, "          {verdict}")
}
