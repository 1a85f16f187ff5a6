//! What a shard serves after an error of its disk, and what is done about it.
//!
//! - The disk is full: reads are served, writes are refused until a probe, each second, succeeds. RocksDB recovers by itself; if it has room
//!   and does not, the shard is opened anew.
//! - What lies on the disk is damaged: reads are served (those of damaged rows are errors), writes are refused until the next start.
//! - Any other error: what a failed write or sync left on the disk is unknown, so nothing is served; the shard is closed and opened anew,
//!   which reads its log again and writes what is in it to new files.

use super::Shard;
use crate::engine::EngineError;
use crate::engine::error::is_echo;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};
use vasto_proto::error::{self, CommandError};

use super::alarm::Alarm;

/// A state of [`Health`], as a number.
const SERVES: u8 = 0;
const READS_ONLY: u8 = 1;
const FAILED: u8 = 2;

/// RocksDB looks every 5 s whether a full disk has room again, and then writes out its memtables.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(8);

#[derive(Debug)]
pub struct Health {
    state: AtomicU8,
    trouble: Mutex<Option<Trouble>>,
    /// What could not be read last: said once, however often it is asked for.
    unreadable: Mutex<String>,
    alarm: Arc<Alarm>,
}

/// Why a shard does not serve everything.
#[derive(Clone, Debug)]
struct Trouble {
    cause: Cause,
    text: String,
    /// Since when the disk has room again while RocksDB still takes no writes.
    room_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Full,
    Damaged,
    Failed,
}

impl Health {
    pub fn new(alarm: Arc<Alarm>) -> Self {
        Self { state: AtomicU8::new(SERVES), trouble: Mutex::default(), unreadable: Mutex::default(), alarm }
    }
}

impl Shard {
    /// Nothing may be served.
    pub fn is_failed(&self) -> bool {
        self.health.state.load(Ordering::Acquire) == FAILED
    }

    /// Reads may be served, writes not.
    pub fn is_read_only(&self) -> bool {
        self.health.state.load(Ordering::Acquire) == READS_ONLY
    }

    /// What the shard suffers from.
    pub fn trouble(&self) -> Option<String> {
        self.health.trouble.lock().as_ref().map(|trouble| trouble.text.clone())
    }

    /// What a client is told whose write is refused.
    pub fn write_refusal(&self) -> CommandError {
        let trouble = self.health.trouble.lock();
        let reason = match &*trouble {
            Some(Trouble { cause: Cause::Full, text, .. }) => {
                format!("{text}; reads are served, writes again when there is space")
            }
            Some(Trouble { cause: Cause::Damaged | Cause::Failed, text, .. }) => text.clone(),
            None => "it has just recovered".to_owned(),
        };
        error::writes_refused(self.key, &reason)
    }

    /// Draws the conclusion from an error that a write met.
    pub fn meet(&self, error: &EngineError) {
        match error {
            EngineError::NotInMemory | EngineError::Stalled => {}
            EngineError::Full(text) => self.serve_reads_only(Cause::Full, text),
            EngineError::Corrupt(_) => self.serve_reads_only(Cause::Damaged, &error.to_string()),
            // The call that met the error itself says which it was, if it has not yet.
            EngineError::Disk(_) if error.is_echo() && self.trouble().is_some() => {}
            EngineError::Disk(_) if error.is_echo() && !self.database.has_room() => {
                self.serve_reads_only(Cause::Full, "No space left on device");
            }
            EngineError::Disk(text) | EngineError::Failed(text) => self.fail(text),
        }
    }

    fn serve_reads_only(&self, cause: Cause, text: &str) {
        let mut trouble = self.health.trouble.lock();
        if trouble.is_none() {
            tracing::error!(shard = %self.key, error = text, "shard refuses writes, reads are served");
            *trouble = Some(Trouble { cause, text: text.to_owned(), room_since: None });
            self.health.state.store(READS_ONLY, Ordering::Release);
        }
    }

    /// Stops serving, for good: the shard must be opened anew.
    pub fn fail(&self, text: &str) {
        let mut trouble = self.health.trouble.lock();
        let is_known = match &*trouble {
            // The cause, which names the file, may come after its echo.
            Some(known) => known.cause == Cause::Failed && (is_echo(text) || !is_echo(&known.text)),
            None => false,
        };
        if !is_known {
            tracing::error!(shard = %self.key, error = text, "shard stops serving, to be closed and opened again");
            *trouble = Some(Trouble { cause: Cause::Failed, text: text.to_owned(), room_since: None });
            self.health.state.store(FAILED, Ordering::Release);
            self.health.alarm.ring();
        }
    }

    /// Called once a second: notices a full disk that nobody has met, and the end of one.
    pub fn check_disk(&self) {
        let cause = self.health.trouble.lock().as_ref().map(|trouble| trouble.cause);
        match cause {
            // A write that RocksDB lets wait for a flush gets no error while there is no room for that flush.
            None => {
                if self.database.is_write_stopped() != 0 && !self.database.has_room() {
                    self.serve_reads_only(Cause::Full, "No space left on device");
                }
            }
            Some(Cause::Full) => self.probe(),
            Some(Cause::Damaged | Cause::Failed) => {}
        }
    }

    /// Looks whether a full disk takes writes again.
    fn probe(&self) {
        // The probe itself would fill a disk that has but a few bytes.
        let probed = if self.database.has_room() { Some(self.database.probe()) } else { None };
        let mut trouble = self.health.trouble.lock();
        let Some(Trouble { cause: Cause::Full, room_since, .. }) = &mut *trouble else { return };
        match probed {
            Some(Ok(())) => {
                *trouble = None;
                self.health.state.store(SERVES, Ordering::Release);
                tracing::info!(shard = %self.key, "shard takes writes again");
            }
            None | Some(Err(EngineError::Stalled)) => *room_since = None,
            Some(Err(error)) => {
                let since = *room_since.get_or_insert_with(Instant::now);
                if since.elapsed() > RECOVERY_PATIENCE {
                    drop(trouble);
                    self.fail(&format!("there is room on the disk, but writes still fail: {error}"));
                }
            }
        }
    }

    /// Logs what could not be read.
    pub fn note_unreadable(&self, text: &str) {
        let mut last = self.health.unreadable.lock();
        if *last != text {
            tracing::error!(shard = %self.key, error = text, "shard cannot read what is on its disk");
            text.clone_into(&mut last);
        }
    }
}
