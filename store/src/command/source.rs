//! The rows of a shard in the order of their physical keys, for those who count them or choose among them, and the tree of the keys.

use std::ops::Range;

/// What a row is to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowState {
    Alive { bytes: u64, expires_at_ms: u64 },
    Expired,
    Tombstone,
    Flushed,
}

/// A cursor over the rows of a shard.
pub trait Source {
    type Error;

    /// Goes to the first row at or after a physical key.
    fn seek(&mut self, physical_key: &[u8]);
    fn next(&mut self);
    /// Slot and state of the row here; `None` behind the last.
    fn row(&self) -> Result<Option<(u16, RowState)>, Self::Error>;
    /// The physical key here.
    fn key(&self) -> Option<&[u8]>;
    /// Bytes of files between physical keys; rows that are in memory only have none.
    fn bytes(&self, ranges: &[Range<Vec<u8>>]) -> Vec<u64>;

    /// Called before the bytes are asked for: puts into files what only memory has, if it is much.
    fn write_out(&mut self);

    fn is_below(&self, prefix: &[u8]) -> bool {
        self.key().is_some_and(|key| key.starts_with(prefix))
    }
}

/// The least physical key that a slot's keys can have.
pub fn start_of(slot: u16) -> Vec<u8> {
    slot.to_be_bytes().to_vec()
}

/// What comes behind a prefix that keys share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    /// The prefix is a whole key.
    Itself,
    Byte(u8),
}

/// What comes behind a prefix, in the order of keys: a seek for each.
pub fn children<S: Source>(source: &mut S, prefix: &[u8]) -> Result<Vec<Child>, S::Error> {
    let mut children = Vec::new();
    let mut next = prefix.to_vec();
    source.seek(&next);
    while let Some(rest) = source.key().and_then(|key| key.strip_prefix(prefix)) {
        let Some(byte) = rest.first().copied() else {
            children.push(Child::Itself);
            source.next();
            continue;
        };
        children.push(Child::Byte(byte));
        let Some(behind) = byte.checked_add(1) else { break };
        next.truncate(prefix.len());
        next.push(behind);
        source.seek(&next);
    }
    // The end may be an error.
    source.row()?;
    Ok(children)
}
