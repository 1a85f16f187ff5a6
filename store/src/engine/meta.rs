//! Names of the entries in the column family `meta`.

/// Version of the shard's layout on disk, u32 big endian.
pub const FORMAT: &[u8] = b"format";
/// Upper bound of the stamps drawn.
pub const STAMPS: &[u8] = b"stamps";
/// Rows up to this stamp are dead.
pub const FLUSH: &[u8] = b"flush";
/// Tombstones with an event time up to this may have been dropped by compaction, u64 big endian.
pub const DROPPED: &[u8] = b"dropped";
/// Written to find out whether the disk takes writes again.
pub const PROBE: &[u8] = b"probe";

/// The sequence number up to which the log was synced, u64 big endian, written when no other write has carried the mark of it.
pub const SYNCED: &[u8] = b"synced";

/// The layout that this code writes. It reads version 1 too, whose rows are valid here: version 2 has rows with event times of clients,
/// which carry when they were written.
pub const FORMAT_VERSION: u32 = 2;
