//! What the server acknowledged, key by key, and whether what is found later agrees with it.
//!
//! Each key is written by one connection, so its versions are ordered: they count up from 1 and are answered in this
//! order. A write has one of three fates: acknowledged, refused (the error says that nothing was executed), or unknown (the
//! connection was lost, or any other error). After an unknown fate the key is *frozen*, never written again: the delayed
//! write may take effect at any later moment, and would be taken for a loss of the newer one.

use std::io::{BufRead, Write};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use super::reply;
use super::value::Values;

/// 16 bytes a key: a million keys cost 16 MB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The last acknowledged version; of a counter: how many increments were acknowledged, plus one for its zero.
    pub acknowledged: u32,
    /// The last version sent; of a counter: how many increments may have happened at most, plus one for its zero.
    pub sent: u32,
    /// The first version whose fate is unknown, 0 when there is none.
    pub first_unknown: u32,
    /// How many fates are unknown.
    pub unknown: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Acknowledged,
    Refused,
    Unknown,
}

impl Fate {
    /// The fate of a write that was answered by this error.
    ///
    /// Only codes by which Redis or Vasto say that nothing was executed are refusals: a wrong entry here would hide nothing,
    /// it would report a violation; a missing one makes a key frozen without need.
    pub fn of_error(text: &[u8]) -> Self {
        let code = text.split(|byte| *byte == b' ').next().unwrap_or_default();
        match code {
            b"LOADING" | b"OOM" | b"READONLY" | b"MISCONF" | b"NOREPLICAS" | b"CLUSTERDOWN" | b"MASTERDOWN"
            | b"MOVED" | b"ASK" | b"TRYAGAIN" | b"WRONGTYPE" | b"NOAUTH" | b"NOPERM" | b"BUSY" => Self::Refused,
            _ => Self::Unknown,
        }
    }
}

impl Entry {
    pub fn is_frozen(&self) -> bool {
        self.first_unknown != 0
    }

    /// A counter whose zero may be written again later can no longer be counted on; other unknown fates only widen what
    /// the counter may hold.
    pub fn may_increment(&self) -> bool {
        self.first_unknown != 1
    }

    /// The version that the next write shall have.
    pub fn begin(&mut self) -> u32 {
        self.sent += 1;
        self.sent
    }

    pub fn settle_value(&mut self, version: u32, fate: Fate) {
        match fate {
            Fate::Acknowledged => self.acknowledged = self.acknowledged.max(version),
            Fate::Refused => {}
            Fate::Unknown => self.note_unknown(version),
        }
    }

    pub fn settle_increment(&mut self, version: u32, fate: Fate) {
        match fate {
            Fate::Acknowledged => self.acknowledged += 1,
            Fate::Refused => self.sent -= 1,
            Fate::Unknown => self.note_unknown(version),
        }
    }

    fn note_unknown(&mut self, version: u32) {
        self.unknown += 1;
        if self.first_unknown == 0 {
            self.first_unknown = version;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// What was acknowledged is there.
    Kept,
    /// A write of unknown fate is there, or nothing was acknowledged: both are allowed.
    Open,
    /// An acknowledged write is gone: the key is missing, or older than it may be.
    Lost,
    /// What is there was never written, or was refused.
    Wrong,
}

/// What a key that holds a value may hold: `found` as read after everything was settled.
pub fn judge_value(values: Values, key: u64, entry: &Entry, found: Option<&[u8]>) -> Verdict {
    if entry.acknowledged == 0 {
        return Verdict::Open;
    }
    let Some(found) = found else { return Verdict::Lost };
    if values.matches(key, entry.acknowledged, found) {
        return Verdict::Kept;
    }
    match version_of(values, key, 1..=entry.sent, found) {
        Some(version) if entry.is_frozen() && version >= entry.first_unknown => Verdict::Open,
        Some(version) if version < entry.acknowledged => Verdict::Lost,
        Some(_) | None => Verdict::Wrong,
    }
}

/// What a counter may hold.
pub fn judge_counter(entry: &Entry, found: Option<&[u8]>) -> Verdict {
    if entry.acknowledged == 0 {
        return Verdict::Open;
    }
    let Some(found) = found else { return Verdict::Lost };
    let Ok(number) = reply::integer(found) else { return Verdict::Wrong };
    // The zero at the start counts as the first version.
    let least = i64::from(entry.acknowledged) - 1;
    let most = least + i64::from(entry.unknown);
    match number {
        number if number == least => Verdict::Kept,
        number if number < least => Verdict::Lost,
        number if number <= most => Verdict::Open,
        _ => Verdict::Wrong,
    }
}

/// What a GET during the load may return: nothing older than what was acknowledged when it was sent (`floor`).
///
/// `found` is compared with the newest versions first: most often the first one is it.
pub fn judge_read(values: Values, key: u64, entry: &Entry, floor: u32, found: Option<&[u8]>) -> Verdict {
    if floor == 0 {
        return Verdict::Open;
    }
    let Some(found) = found else { return Verdict::Lost };
    let oldest = if entry.is_frozen() { floor.min(entry.first_unknown) } else { floor };
    if version_of(values, key, oldest..=entry.sent, found).is_some() {
        Verdict::Kept
    } else if version_of(values, key, 1..=oldest, found).is_some() {
        Verdict::Lost
    } else {
        Verdict::Wrong
    }
}

fn version_of(values: Values, key: u64, range: std::ops::RangeInclusive<u32>, found: &[u8]) -> Option<u32> {
    range.rev().find(|version| values.matches(key, *version, found))
}

/// Which keys a thread of the load generator remembers, and where: the keys of its connections.
///
/// Connection `i` of all owns the keys whose number is `i` modulo the number of connections; thread `t` drives the
/// connections whose number is `t` modulo the number of threads.
#[derive(Clone, Copy, Debug)]
pub struct Partition {
    pub keys: u64,
    pub connections: u64,
    pub threads: u64,
    pub thread: u64,
}

impl Partition {
    /// How many connections this thread drives.
    pub fn own_connections(&self) -> u64 {
        share(self.connections, self.threads, self.thread)
    }

    /// The key of this connection next to `key`, so that the connection keeps to its own keys and nearly to the distribution.
    pub fn owned_by(&self, key: u64, connection: u64) -> u64 {
        let owned = key - key % self.connections + connection;
        if owned < self.keys { owned } else { owned - self.connections }
    }

    /// A key of this thread next to `key`.
    pub fn owned_by_thread(&self, key: u64) -> u64 {
        let connection = key % self.connections;
        if connection % self.threads == self.thread {
            return key;
        }
        let near = connection - connection % self.threads + self.thread;
        self.owned_by(key, if near < self.connections { near } else { near - self.threads })
    }

    /// How many keys this thread owns.
    pub fn len(&self) -> u64 {
        let rest = self.keys % self.connections;
        self.keys / self.connections * self.own_connections() + share(rest, self.threads, self.thread)
    }

    pub fn index_of(&self, key: u64) -> usize {
        (key / self.connections * self.own_connections() + key % self.connections / self.threads) as usize
    }

    pub fn key_at(&self, index: u64) -> u64 {
        let own = self.own_connections();
        index / own * self.connections + index % own * self.threads + self.thread
    }
}

/// How many of the numbers below `total` are `part` modulo `parts`.
pub fn share(total: u64, parts: u64, part: u64) -> u64 {
    total / parts + u64::from(part < total % parts)
}

/// All that is needed to judge later what a server holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub seed: u64,
    pub keys: u64,
    pub key_prefix: String,
    pub value_size: String,
    pub counters: bool,
}

/// A ledger of all threads, sorted by key, without the keys that were never written.
#[derive(Clone, Debug, PartialEq)]
pub struct Ledger {
    pub header: Header,
    pub entries: Vec<(u64, Entry)>,
}

const FILE_TITLE: &str = "vasto-bench-ledger 1";

impl Ledger {
    /// One line a key; the last line holds their number, so that a cut file is noticed.
    pub fn write(&self, output: &mut impl Write) -> anyhow::Result<()> {
        writeln!(output, "{FILE_TITLE}")?;
        writeln!(output, "{}", serde_json::to_string(&self.header)?)?;
        for (key, entry) in &self.entries {
            let Entry { acknowledged, sent, first_unknown, unknown } = entry;
            writeln!(output, "{key} {acknowledged} {sent} {first_unknown} {unknown}")?;
        }
        writeln!(output, "end {}", self.entries.len())?;
        output.flush()?;
        Ok(())
    }

    pub fn read(input: impl BufRead) -> anyhow::Result<Self> {
        let mut lines = input.lines();
        let mut line = move || lines.next().context("the file ends early")?.map_err(anyhow::Error::from);
        ensure!(line()? == FILE_TITLE, "not a ledger of this version");
        let header = serde_json::from_str(&line()?).context("header")?;
        let mut entries = Vec::new();
        loop {
            let text = line()?;
            if let Some(count) = text.strip_prefix("end ") {
                ensure!(count.parse() == Ok(entries.len()), "number of keys differs from the last line");
                return Ok(Self { header, entries });
            }
            entries.push(entry_of(&text).with_context(|| format!("line {text:?}"))?);
        }
    }
}

fn entry_of(line: &str) -> anyhow::Result<(u64, Entry)> {
    let mut words = line.split(' ');
    let key = words.next().unwrap_or_default().parse()?;
    let mut number = || -> anyhow::Result<u32> { Ok(words.next().context("too short")?.parse()?) };
    let entry = Entry { acknowledged: number()?, sent: number()?, first_unknown: number()?, unknown: number()? };
    if words.next().is_some() {
        bail!("too long");
    }
    Ok((key, entry))
}

#[cfg(test)]
mod tests {

    use super::*;

    const KEY: u64 = 5;

    fn values() -> Values {
        Values { seed: 1, size: "16".parse().unwrap() }
    }

    fn value(version: u32) -> Vec<u8> {
        let mut value = Vec::new();
        values().append(KEY, version, &mut value);
        value
    }

    /// One letter a write: `a`cknowledged, `r`efused, `u`nknown.
    fn entry(fates: &str, settle: fn(&mut Entry, u32, Fate)) -> Entry {
        let mut entry = Entry::default();
        for fate in fates.chars() {
            let version = entry.begin();
            let fate = match fate {
                'a' => Fate::Acknowledged,
                'r' => Fate::Refused,
                _ => Fate::Unknown,
            };
            settle(&mut entry, version, fate);
        }
        entry
    }

    #[test]
    fn values_are_judged_by_the_fates_of_their_writes() {
        // (fates, verdict when missing, verdicts when version 1, 2, 3… is there)
        for (fates, missing, found) in [
            ("a", Verdict::Lost, vec![Verdict::Kept]),
            ("aa", Verdict::Lost, vec![Verdict::Lost, Verdict::Kept]),
            ("ar", Verdict::Lost, vec![Verdict::Kept, Verdict::Wrong]),
            ("au", Verdict::Lost, vec![Verdict::Kept, Verdict::Open]),
            ("aau", Verdict::Lost, vec![Verdict::Lost, Verdict::Kept, Verdict::Open]),
            ("aua", Verdict::Lost, vec![Verdict::Lost, Verdict::Open, Verdict::Kept]),
            ("u", Verdict::Open, vec![Verdict::Open]),
            ("r", Verdict::Open, vec![Verdict::Open]),
        ] {
            let entry = entry(fates, Entry::settle_value);
            assert_eq!(judge_value(values(), KEY, &entry, None), missing, "{fates} missing");
            for (version, expected) in (1..).zip(found) {
                let verdict = judge_value(values(), KEY, &entry, Some(&value(version)));
                assert_eq!(verdict, expected, "{fates} version {version}");
            }
        }
    }

    #[test]
    fn what_was_never_written_is_wrong() {
        let entry = entry("aaa", Entry::settle_value);
        for found in [b"".as_slice(), b"something else", &value(4), &value(3)[..15]] {
            assert_eq!(judge_value(values(), KEY, &entry, Some(found)), Verdict::Wrong);
        }
    }

    #[test]
    fn counters_are_judged_by_number() {
        // The first write is the zero.
        for (fates, number, expected) in [
            ("a", "0", Verdict::Kept),
            ("aaa", "2", Verdict::Kept),
            ("aaa", "1", Verdict::Lost),
            ("aaa", "3", Verdict::Wrong),
            ("aara", "2", Verdict::Kept),
            ("aara", "3", Verdict::Wrong),
            ("aaua", "2", Verdict::Kept),
            ("aaua", "3", Verdict::Open),
            ("aaua", "4", Verdict::Wrong),
            ("aaa", "two", Verdict::Wrong),
        ] {
            let entry = entry(fates, Entry::settle_increment);
            assert_eq!(judge_counter(&entry, Some(number.as_bytes())), expected, "{fates} {number}");
        }
        assert_eq!(judge_counter(&entry("aa", Entry::settle_increment), None), Verdict::Lost);
    }

    #[test]
    fn a_read_may_not_go_back_before_what_was_acknowledged() {
        let entry = entry("aaaa", Entry::settle_value);
        let judge = |floor, found: Option<u32>| judge_read(values(), KEY, &entry, floor, found.map(value).as_deref());
        assert_eq!(judge(0, None), Verdict::Open);
        assert_eq!(judge(2, None), Verdict::Lost);
        assert_eq!(judge(2, Some(1)), Verdict::Lost);
        assert_eq!(judge(2, Some(2)), Verdict::Kept);
        assert_eq!(judge(2, Some(4)), Verdict::Kept);
        assert_eq!(judge(2, Some(5)), Verdict::Wrong);
    }

    #[test]
    fn only_errors_that_say_so_are_refusals() {
        assert_eq!(Fate::of_error(b"OOM command not allowed"), Fate::Refused);
        assert_eq!(Fate::of_error(b"UNKNOWN the connection was lost"), Fate::Unknown);
        assert_eq!(Fate::of_error(b"ERR something"), Fate::Unknown);
        assert_eq!(Fate::of_error(b""), Fate::Unknown);
    }

    #[test]
    fn partitions_divide_the_keys_among_threads_and_connections() {
        for (keys, connections, threads) in [(10, 3, 2), (100, 7, 3), (64, 8, 4), (5, 5, 5), (9, 4, 1)] {
            let mut owners = vec![0; keys as usize];
            for thread in 0..threads {
                let partition = Partition { keys, connections, threads, thread };
                for index in 0..partition.len() {
                    let key = partition.key_at(index);
                    assert_eq!(partition.index_of(key), index as usize);
                    assert_eq!(key % connections % threads, thread);
                    owners[key as usize] += 1;
                }
                for key in 0..keys {
                    let own = partition.owned_by_thread(key);
                    assert!(own < keys && own % connections % threads == thread);
                    for connection in 0..connections {
                        let own = partition.owned_by(key, connection);
                        assert!(own < keys && own % connections == connection);
                    }
                }
            }
            assert!(owners.iter().all(|count| *count == 1), "{keys} {connections} {threads}: {owners:?}");
        }
    }

    #[test]
    fn a_ledger_file_is_read_back_and_a_cut_one_refused() {
        let ledger = Ledger {
            header: Header { seed: 9, keys: 10, key_prefix: "a b".into(), value_size: "8-9".into(), counters: false },
            entries: vec![(0, entry("aau", Entry::settle_value)), (7, entry("a", Entry::settle_value))],
        };
        let mut file = Vec::new();
        ledger.write(&mut file).unwrap();
        assert_eq!(Ledger::read(file.as_slice()).unwrap(), ledger);
        for end in 0..file.len() - 1 {
            assert!(Ledger::read(&file[..end]).is_err(), "cut at {end}");
        }
    }
}
