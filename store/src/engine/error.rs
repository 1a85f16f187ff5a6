//! What the engine would not do, told apart by what can be done about it.

use rocksdb::ErrorKind;
use thiserror::Error;

/// What RocksDB would not do. Texts are RocksDB's own: they name the file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum EngineError {
    /// It would have to read from disk.
    #[error("not in memory")]
    NotInMemory,
    /// It would have to wait for a flush or a compaction; nothing was written.
    #[error("writes are stalled")]
    Stalled,
    /// The disk, or what may be used of it, is full.
    #[error("{0}")]
    Full(String),
    /// The disk failed in another way.
    #[error("{0}")]
    Disk(String),
    /// What lies on the disk is not what was written there.
    #[error("{0}; {ADVICE}")]
    Corrupt(String),
    #[error("{0}")]
    Failed(String),
}

const ADVICE: &str = "nothing was deleted or repaired: restore the shard's folder from a backup or another copy";

/// How the system says that a disk or a quota is full, and how RocksDB says that its own limit is reached.
const FULL: [&str; 3] = ["No space left on device", "Disk quota exceeded", "Space limit reached"];
/// A file of the database is not there.
const MISSING: [&str; 2] = ["No such file or directory", "does not exist (create_if_missing is false)"];
/// A write that waited in vain says why it did behind these words.
const WAITED: &str = "Result incomplete: ";
/// What RocksDB says of a file after it met an error there.
const ECHOES: [&str; 2] = ["Writer has previous error", "Seen error. Skip writing buffer"];

impl EngineError {
    /// Whether this is only the consequence of an error that another call has met.
    pub fn is_echo(&self) -> bool {
        matches!(self, Self::Disk(text) if is_echo(text))
    }
}

/// As [`EngineError::is_echo`], for the text.
pub fn is_echo(text: &str) -> bool {
    ECHOES.iter().any(|echo| text.contains(echo))
}

impl From<rocksdb::Error> for EngineError {
    fn from(error: rocksdb::Error) -> Self {
        let kind = error.kind();
        classify(&kind, error.into_string())
    }
}

fn classify(kind: &ErrorKind, text: String) -> EngineError {
    let says_one_of = |words: &[&str]| words.iter().any(|words| text.contains(words));
    match kind {
        ErrorKind::Corruption => EngineError::Corrupt(text),
        ErrorKind::IOError if says_one_of(&FULL) => EngineError::Full(text),
        ErrorKind::IOError | ErrorKind::InvalidArgument if says_one_of(&MISSING) => EngineError::Corrupt(text),
        ErrorKind::IOError => EngineError::Disk(text),
        ErrorKind::Incomplete => match text.strip_prefix(WAITED) {
            Some(cause) if cause.starts_with("IO error: ") => classify(&ErrorKind::IOError, text),
            Some(cause) if cause.starts_with("Corruption: ") => classify(&ErrorKind::Corruption, text),
            Some(_) | None => EngineError::Failed(text),
        },
        _ => EngineError::Failed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case = (ErrorKind, &'static str, fn(String) -> EngineError);

    #[test]
    fn errors_are_told_apart_and_keep_their_text() {
        let cases: [Case; 14] = [
            (
                ErrorKind::IOError,
                "IO error: No space left on device: While appending to file: /d/000008.log: No space left on device",
                EngineError::Full,
            ),
            (
                ErrorKind::IOError,
                "IO error: While appending to file: /d/000008.log: Disk quota exceeded",
                EngineError::Full,
            ),
            (ErrorKind::IOError, "IO error: Space limit reached: Max allowed space was reached", EngineError::Full),
            (ErrorKind::IOError, "IO error: While fdatasync: /d/000008.log: Input/output error", EngineError::Disk),
            (ErrorKind::IOError, "IO error: Writer has previous error.", EngineError::Disk),
            (
                ErrorKind::IOError,
                "IO error: While lock file: /d/LOCK: Resource temporarily unavailable",
                EngineError::Disk,
            ),
            (
                ErrorKind::IOError,
                "IO error: No such file or directory: While open a file for random read: /d/000012.sst: No such file or directory",
                EngineError::Corrupt,
            ),
            (
                ErrorKind::InvalidArgument,
                "Invalid argument: /d/CURRENT: does not exist (create_if_missing is false)",
                EngineError::Corrupt,
            ),
            (
                ErrorKind::Corruption,
                "Corruption: block checksum mismatch: stored = 1, computed = 2  in /d/000012.sst offset 0 size 9",
                EngineError::Corrupt,
            ),
            (
                ErrorKind::Incomplete,
                "Result incomplete: IO error: No space left on device: While appending to file: /d/000013.sst: No space left on device",
                EngineError::Full,
            ),
            (
                ErrorKind::Incomplete,
                "Result incomplete: IO error: While fsync: /d: Input/output error",
                EngineError::Disk,
            ),
            (ErrorKind::Incomplete, "Result incomplete: Corruption: bad block in /d/000012.sst", EngineError::Corrupt),
            (ErrorKind::Incomplete, "Result incomplete: Write stall", EngineError::Failed),
            (ErrorKind::ShutdownInProgress, "Shutdown in progress: ", EngineError::Failed),
        ];
        for (kind, text, expected) in cases {
            assert_eq!(classify(&kind, text.to_owned()), expected(text.to_owned()));
        }
    }

    #[test]
    fn what_is_damaged_comes_with_advice() {
        let text = "Corruption: checksum mismatch in file /d/MANIFEST-000005";
        let shown = classify(&ErrorKind::Corruption, text.to_owned()).to_string();
        assert!(shown.starts_with(text) && shown.contains("restore the shard's folder"), "{shown}");
    }

    #[test]
    fn an_echo_is_no_cause() {
        assert!(EngineError::Disk("IO error: Writer has previous error.".into()).is_echo());
        assert!(EngineError::Disk("IO error: Seen error. Skip writing buffer.".into()).is_echo());
        assert!(!EngineError::Disk("IO error: While fdatasync: /d/000008.log: Input/output error".into()).is_echo());
    }
}
