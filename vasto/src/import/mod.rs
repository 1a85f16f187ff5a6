//! `vasto import`: the strings of an RDB file, with the times at which they expire, into a running server.
//!
//! The file is read twice: first to its end, so that a damaged one changes nothing, then to send what is in it.

mod rdb_file;
mod sender;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::ValueEnum;
use vasto_proto::rdb::Kind;

use crate::bench::{ServerSettings, Target};
use rdb_file::{FileError, RdbFile, Strings, Value};
use sender::{Answers, Sender};

/// Something of the file was not imported, and no option says that this is well.
const EXIT_INCOMPLETE: u8 = 3;

const READ_BYTES: usize = 1 << 20;
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Keys between two looks at the clock.
const PROGRESS_KEYS: u64 = 256;

/// The command line of `vasto import`.
#[derive(Clone, Debug, clap::Args)]
pub struct ImportArguments {
    /// The RDB file: dump.rdb of redis-server up to 7.2.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Address of a gateway.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6379", value_parser = crate::cli::remote_address)]
    to: String,

    /// What happens with keys that exist already.
    #[arg(long, value_enum, default_value_t = Existing::Replace)]
    existing: Existing,

    /// Databases of the file to import from; all go into keyspace 0, and of a key in several of them the last one stays [default: 0, or
    /// all with --keep-databases].
    #[arg(long = "database", value_name = "NUMBER", value_delimiter = ',')]
    databases: Vec<u64>,

    /// Each database of the file goes into the database of its number, which is created if it is not there.
    #[arg(long)]
    keep_databases: bool,

    /// Values of other types than strings, functions and data of modules are left out without changing the exit status.
    #[arg(long)]
    skip_other_types: bool,

    /// Keys of other databases are left out without changing the exit status.
    #[arg(long)]
    skip_other_databases: bool,

    /// Imports what can be read of a damaged file: it is not read to its end first.
    #[arg(long)]
    unchecked: bool,

    /// Commands under way at one time.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(1..))]
    pipeline: u16,

    /// Seconds without an answer after which the import ends.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,

    /// Shows no progress (it is shown each second when the error output is a terminal).
    #[arg(long, short = 'q')]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Existing {
    /// The value of the file replaces theirs.
    Replace,
    /// They stay as they are, and are counted.
    Keep,
    /// The import ends with an error at the first one.
    Refuse,
}

/// What became of the keys of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    answers: Answers,
    sent: u64,
    sent_with_expiry: u64,
    expired: u64,
    other_types: BTreeMap<Kind, u64>,
    functions: u64,
    module_data: u64,
    other_databases: BTreeMap<u64, u64>,
}

impl ImportArguments {
    fn takes(&self, database: u64) -> bool {
        match self.databases.as_slice() {
            [] => self.keep_databases || database == 0,
            chosen => chosen.contains(&database),
        }
    }
}

impl Tally {
    fn exit_code(&self, arguments: &ImportArguments) -> ExitCode {
        let has_other_types = !self.other_types.is_empty() || self.functions > 0 || self.module_data > 0;
        let is_incomplete = has_other_types && !arguments.skip_other_types
            || !self.other_databases.is_empty() && !arguments.skip_other_databases;
        if is_incomplete { ExitCode::from(EXIT_INCOMPLETE) } else { ExitCode::SUCCESS }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "imported: {} strings", self.answers.stored)?;
        if self.answers.stored + self.answers.kept < self.sent {
            let unknown = self.sent - self.answers.stored - self.answers.kept;
            write!(formatter, " (and perhaps some of {unknown} more, which were not answered for)")?;
        } else if self.sent_with_expiry > 0 && self.answers.kept == 0 {
            write!(formatter, ", {} of them with an expiry", self.sent_with_expiry)?;
        }
        if self.answers.kept > 0 {
            write!(formatter, "\nkept: {} keys that existed already", self.answers.kept)?;
        }
        if self.expired > 0 {
            write!(formatter, "\nskipped: {} strings that have expired", self.expired)?;
        }
        for (kind, count) in &self.other_types {
            write!(formatter, "\nnot imported: {count} of type {kind}")?;
        }
        if self.functions > 0 {
            write!(formatter, "\nnot imported: {} libraries of functions", self.functions)?;
        }
        if self.module_data > 0 {
            write!(formatter, "\nnot imported: {} pieces of modules' own data", self.module_data)?;
        }
        for (database, count) in &self.other_databases {
            write!(formatter, "\nnot imported: {count} keys of database {database}")?;
        }
        Ok(())
    }
}

fn open(path: &Path, strings: Strings) -> anyhow::Result<RdbFile<BufReader<File>>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    RdbFile::open(BufReader::with_capacity(READ_BYTES, file), strings).map_err(|error| unusable(path, error))
}

fn unusable(path: &Path, error: FileError) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("{} cannot be read", path.display()))
}

/// Reads the file to its end.
fn check(arguments: &ImportArguments, progress: &mut Progress) -> anyhow::Result<()> {
    let mut file = open(&arguments.file, Strings::Skip)?;
    let mut keys = 0;
    while file.next().map_err(|error| unusable(&arguments.file, error))?.is_some() {
        keys += 1;
        progress.show(keys, || ("checked", file.offset()));
    }
    Ok(())
}

pub fn run(arguments: ImportArguments) -> anyhow::Result<ExitCode> {
    let mut progress = Progress::new(&arguments)?;
    if !arguments.unchecked {
        let hint = "nothing was imported; --unchecked imports what stands before the damage";
        let checked = check(&arguments, &mut progress).context(hint);
        progress.clear();
        checked?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let mut tally = Tally::default();
    let imported = runtime.block_on(import(&arguments, &mut tally, &mut progress));
    progress.clear();
    // Also after an error: how far it came.
    writeln!(std::io::stdout(), "{tally}").context("print the summary")?;
    imported?;
    Ok(tally.exit_code(&arguments))
}

async fn import(arguments: &ImportArguments, tally: &mut Tally, progress: &mut Progress) -> anyhow::Result<()> {
    let server = ServerSettings {
        targets: vec![Target::Tcp(arguments.to.clone())],
        protocol: 2,
        database: 0,
        timeout: Duration::from_secs(arguments.timeout),
        reconnect_for: Duration::ZERO,
    };
    let mut file = open(&arguments.file, Strings::Read)?;
    let mut sender = Sender::connect(server, arguments.existing, arguments.pipeline.into()).await?;
    let fed = feed(arguments, &mut file, &mut sender, tally, progress).await;
    // What was read before an error of the file is imported all the same.
    let finished = match &fed {
        Err(error) if error.downcast_ref::<FileError>().is_none() => Ok(()),
        Ok(()) | Err(_) => sender.finish().await,
    };
    tally.answers = sender.answers;
    (tally.functions, tally.module_data) = (file.functions, file.module_data);
    fed.and(finished)
}

async fn feed(
    arguments: &ImportArguments,
    file: &mut RdbFile<BufReader<File>>,
    sender: &mut Sender,
    tally: &mut Tally,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let (mut keys, mut selected) = (0, 0);
    while let Some(entry) = file.next().map_err(|error| unusable(&arguments.file, error))? {
        keys += 1;
        progress.show(keys, || ("imported", file.offset()));
        if !arguments.takes(entry.database) {
            *tally.other_databases.entry(entry.database).or_default() += 1;
            continue;
        }
        match entry.value {
            Value::Other(kind) => *tally.other_types.entry(kind).or_default() += 1,
            Value::String(_) if entry.expires_at_ms.is_some_and(|when| when <= now_ms()) => tally.expired += 1,
            Value::String(value) => {
                if arguments.keep_databases && entry.database != selected {
                    sender.select(entry.database).await?;
                    selected = entry.database;
                }
                tally.sent += 1;
                tally.sent_with_expiry += u64::from(entry.expires_at_ms.is_some());
                sender.send(&entry.key, &value, entry.expires_at_ms).await?;
            }
        }
    }
    Ok(())
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

/// A line on the terminal that says how far it is.
struct Progress {
    is_shown: bool,
    file_bytes: u64,
    last: Instant,
}

impl Progress {
    fn new(arguments: &ImportArguments) -> anyhow::Result<Self> {
        let path = &arguments.file;
        let file_bytes = std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?.len();
        let is_shown = !arguments.quiet && std::io::stderr().is_terminal();
        Ok(Self { is_shown, file_bytes, last: Instant::now() })
    }

    fn show(&mut self, keys: u64, state: impl FnOnce() -> (&'static str, u64)) {
        if !self.is_shown || !keys.is_multiple_of(PROGRESS_KEYS) || self.last.elapsed() < PROGRESS_INTERVAL {
            return;
        }
        self.last = Instant::now();
        let (what, offset) = state();
        let share = offset as f64 * 100.0 / self.file_bytes.max(1) as f64;
        // A terminal that went away is no reason to stop.
        let _ = write!(std::io::stderr(), "\r\x1b[K{share:3.0} % {what}, {keys} keys");
    }

    fn clear(&self) {
        if self.is_shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_all_that_was_left_out() {
        let tally = Tally {
            answers: Answers { stored: 7, kept: 2 },
            sent: 9,
            sent_with_expiry: 3,
            expired: 1,
            other_types: [(Kind::List, 2), (Kind::SortedSet, 1)].into(),
            functions: 1,
            module_data: 0,
            other_databases: [(1, 5)].into(),
        };
        let expected = "imported: 7 strings\nkept: 2 keys that existed already\nskipped: 1 strings that have expired\n\
                        not imported: 2 of type list\nnot imported: 1 of type sorted set\n\
                        not imported: 1 libraries of functions\nnot imported: 5 keys of database 1";
        assert_eq!(tally.to_string(), expected);
        let broken = Tally { answers: Answers { stored: 1, kept: 0 }, sent: 3, ..Tally::default() };
        assert_eq!(broken.to_string(), "imported: 1 strings (and perhaps some of 2 more, which were not answered for)");
    }
}
