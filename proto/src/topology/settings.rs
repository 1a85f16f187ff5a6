//! Settings of a keyspace: they lie in its record, and what the record does not say is the store's own option.

use super::record::RecordError;
use crate::pb;
use std::fmt;

/// When a write reaches the disk for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fsync {
    /// Before it is answered; all that wait share one sync.
    Always,
    /// Within a second, as Redis does by default.
    #[default]
    EverySecond,
    /// When the kernel pleases.
    Never,
}

impl Fsync {
    /// In the order in which Redis lists the words of `appendfsync`.
    pub const ALL: [Self; 3] = [Self::EverySecond, Self::Always, Self::Never];

    /// The word of Redis's `appendfsync`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::EverySecond => "everysec",
            Self::Never => "no",
        }
    }

    /// Finds the value of a word in any case.
    pub fn from_word(word: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|fsync| fsync.word().as_bytes().eq_ignore_ascii_case(word))
    }

    /// A number on the wire; `None` if it is left out.
    pub fn from_code(code: i32) -> Result<Option<Self>, RecordError> {
        match pb::Fsync::try_from(code) {
            Ok(pb::Fsync::Unset) => Ok(None),
            Ok(pb::Fsync::Always) => Ok(Some(Self::Always)),
            Ok(pb::Fsync::EverySecond) => Ok(Some(Self::EverySecond)),
            Ok(pb::Fsync::Never) => Ok(Some(Self::Never)),
            Err(_) => Err(RecordError::Setting { name: "fsync", code }),
        }
    }

    pub fn code(fsync: Option<Self>) -> i32 {
        let message = match fsync {
            None => pb::Fsync::Unset,
            Some(Self::Always) => pb::Fsync::Always,
            Some(Self::EverySecond) => pb::Fsync::EverySecond,
            Some(Self::Never) => pb::Fsync::Never,
        };
        message.into()
    }
}

impl fmt::Display for Fsync {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.word())
    }
}

/// What a record says beside who serves what; in a request for a change: what is to be changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `None`: each store's own option holds.
    pub fsync: Option<Fsync>,
    /// Replicas that must have applied a write before it is acknowledged. `None`: 0.
    pub min_replicas: Option<u32>,
    /// Whether a primary without a lease stops serving. `None`: yes.
    pub strict: Option<bool>,
}

impl Settings {
    /// These settings with what `changes` names changed.
    pub fn changed_by(&self, changes: &Settings) -> Self {
        Self {
            fsync: changes.fsync.or(self.fsync),
            min_replicas: changes.min_replicas.or(self.min_replicas),
            strict: changes.strict.or(self.strict),
        }
    }

    /// Replicas that must have applied a write before it is acknowledged.
    pub fn min_replicas(&self) -> u32 {
        self.min_replicas.unwrap_or(0)
    }

    /// Whether a primary without a lease stops serving.
    pub fn strict(&self) -> bool {
        self.strict.unwrap_or(true)
    }
}

impl From<&Settings> for pb::KeyspaceSettings {
    fn from(settings: &Settings) -> Self {
        Self { fsync: Fsync::code(settings.fsync), min_replicas: settings.min_replicas, strict: settings.strict }
    }
}

impl TryFrom<pb::KeyspaceSettings> for Settings {
    type Error = RecordError;

    fn try_from(message: pb::KeyspaceSettings) -> Result<Self, RecordError> {
        let fsync = Fsync::from_code(message.fsync)?;
        Ok(Self { fsync, min_replicas: message.min_replicas, strict: message.strict })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_round_trip_and_an_unknown_value_is_refused() {
        for fsync in Fsync::ALL.into_iter().map(Some).chain([None]) {
            let settings = Settings { fsync, min_replicas: Some(2), strict: Some(false) };
            assert_eq!(Settings::try_from(pb::KeyspaceSettings::from(&settings)), Ok(settings));
        }
        let later = pb::KeyspaceSettings { fsync: 9, ..Default::default() };
        assert_eq!(Settings::try_from(later), Err(RecordError::Setting { name: "fsync", code: 9 }));
    }

    #[test]
    fn a_change_leaves_alone_what_it_does_not_name() {
        let always = Settings { fsync: Some(Fsync::Always), ..Settings::default() };
        assert_eq!(always.changed_by(&Settings::default()), always);
        assert_eq!(Settings::default().changed_by(&always), always);
        assert_eq!(Fsync::from_word(b"EverySec"), Some(Fsync::EverySecond));
        assert_eq!(Fsync::from_word(b"yes"), None);
    }
}
