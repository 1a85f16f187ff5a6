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

/// The eras that led to what the shard holds: see `replication::history`.
pub const HISTORY: &[u8] = b"history";
/// How far the copy has come in the log of another store, written with the rows; or where it stood when it stopped leading.
pub const POSITION: &[u8] = b"position";
/// Drawn for each log: sequence numbers of one say nothing about those of another, as a copy's.
pub const LOG_ID: &[u8] = b"log-id";
/// Up to where in which log (its id, then the sequence number, u64 big endian both) enough replicas had applied it.
pub const REPLICATED: &[u8] = b"replicated";

/// Whether rows may be here of slots that the shard does not own, and what has come of other shards' slots: see `resize::note`.
pub const FOREIGN: &[u8] = b"foreign";

/// The layout that this code writes. It reads version 1 too, whose rows are valid here: version 2 has rows with event times of clients,
/// which carry when they were written.
pub const FORMAT_VERSION: u32 = 2;
