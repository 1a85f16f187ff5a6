//! Sends strings to a server, many at a time, and counts what it answers.

use std::collections::VecDeque;

use anyhow::{Context, bail};

use crate::bench::connection::{self, Link};
use crate::bench::reply::{self, Reply};
use crate::bench::{ServerSettings, Target};

use super::Existing;

/// What is written at once.
const OUTPUT_BYTES: usize = 128 << 10;
const INPUT_BYTES: usize = 16 << 10;
/// Of a key that an error message names.
const SHOWN_KEY_BYTES: usize = 100;

/// What the server has answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    pub stored: u64,
    /// The key was there already and was left as it was.
    pub kept: u64,
}

pub struct Sender {
    link: Link,
    server: ServerSettings,
    existing: Existing,
    pipeline: usize,
    output: Vec<u8>,
    input: Vec<u8>,
    /// `input` up to here belongs to answers that were taken.
    taken: usize,
    /// The keys whose answers have not come, for messages; cut.
    owed: VecDeque<Vec<u8>>,
    pub answers: Answers,
}

impl Sender {
    /// Connects, or says why that cannot be.
    pub async fn connect(server: ServerSettings, existing: Existing, pipeline: usize) -> anyhow::Result<Self> {
        let target: &Target = server.targets.first().context("an address is given")?;
        let link = connection::connect(&server, target).await.with_context(|| format!("cannot connect to {target}"))?;
        let (output, input, owed) = (Vec::new(), Vec::new(), VecDeque::new());
        Ok(Self { link, server, existing, pipeline, output, input, taken: 0, owed, answers: Answers::default() })
    }

    /// Sends one string, sooner or later.
    pub async fn send(&mut self, key: &[u8], value: &[u8], expires_at_ms: Option<i64>) -> anyhow::Result<()> {
        let expiry = expires_at_ms.map(|when| when.to_string());
        let mut words: Vec<&[u8]> = vec![b"SET", key, value];
        if let Some(expiry) = &expiry {
            words.extend([&b"PXAT"[..], expiry.as_bytes()]);
        }
        match self.existing {
            Existing::Replace => {}
            Existing::Keep | Existing::Refuse => words.push(b"NX"),
        }
        append_words(&words, &mut self.output);
        self.owed.push_back(key[..key.len().min(SHOWN_KEY_BYTES)].to_vec());
        if self.output.len() >= OUTPUT_BYTES || self.owed.len() >= self.pipeline {
            self.write().await?;
            // Half of it stays under way while the next is read from the file.
            self.take_answers(self.pipeline / 2).await?;
        }
        Ok(())
    }

    /// What is sent from here on goes into the database of this number. A file has few of them: it waits for all answers.
    pub async fn select(&mut self, database: u64) -> anyhow::Result<()> {
        self.finish().await?;
        append_words(&[b"SELECT", database.to_string().as_bytes()], &mut self.output);
        self.write().await?;
        loop {
            match reply::parse(&self.input[self.taken..])? {
                None => self.receive().await?,
                Some((Reply::Push, length)) => self.taken += length,
                Some((Reply::Simple(_), length)) => {
                    self.taken += length;
                    return Ok(());
                }
                Some((Reply::Error(text), _)) => {
                    bail!("database {database} cannot be chosen: {}", String::from_utf8_lossy(text))
                }
                Some((other, _)) => bail!("SELECT {database} is answered with {other:?}"),
            }
        }
    }

    /// Sends what is left and waits for all answers.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        self.write().await?;
        self.take_answers(0).await
    }

    async fn write(&mut self) -> anyhow::Result<()> {
        let written = tokio::time::timeout(self.server.timeout, self.link.write_all(&self.output)).await;
        written.context("the server takes nothing any more")?.context("the connection is lost")?;
        self.output.clear();
        self.output.shrink_to(2 * OUTPUT_BYTES);
        Ok(())
    }

    /// Takes answers until no more than so many are owed.
    async fn take_answers(&mut self, owed_max: usize) -> anyhow::Result<()> {
        while self.owed.len() > owed_max {
            let Some((reply, length)) = reply::parse(&self.input[self.taken..])? else {
                self.receive().await?;
                continue;
            };
            if reply == Reply::Push {
                self.taken += length;
                continue;
            }
            let key = self.owed.pop_front().unwrap_or_default();
            match (reply, self.existing) {
                (Reply::Simple(_), _) => self.answers.stored += 1,
                (Reply::Nil, Existing::Keep) => self.answers.kept += 1,
                (Reply::Nil, Existing::Replace | Existing::Refuse) => {
                    bail!("key '{}' exists already", key.escape_ascii())
                }
                (Reply::Error(text), _) => {
                    bail!("key '{}' is refused: {}", key.escape_ascii(), String::from_utf8_lossy(text));
                }
                (other @ (Reply::Integer(_) | Reply::Bulk(_) | Reply::Push | Reply::Other), _) => {
                    bail!("key '{}' is answered with {other:?}", key.escape_ascii());
                }
            }
            self.taken += length;
        }
        Ok(())
    }

    async fn receive(&mut self) -> anyhow::Result<()> {
        self.input.drain(..self.taken);
        self.taken = 0;
        let mut chunk = [0; INPUT_BYTES];
        let read = tokio::time::timeout(self.server.timeout, self.link.read(&mut chunk)).await;
        let length = read.context("the server does not answer any more")?.context("the connection is lost")?;
        if length == 0 {
            bail!("the server closed the connection");
        }
        self.input.extend_from_slice(&chunk[..length]);
        Ok(())
    }
}

fn append_words(words: &[&[u8]], output: &mut Vec<u8>) {
    output.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        output.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        output.extend_from_slice(word);
        output.extend_from_slice(b"\r\n");
    }
}
