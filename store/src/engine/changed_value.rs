//! Hands RocksDB a new value from a compaction filter: the one place with unsafe code.
//!
//! The binding takes new values as `&'static [u8]` ([`CompactionDecision::Change`]) and passes pointer and length on to RocksDB's C
//! interface, which copies the bytes as soon as the filter has returned (`rocksdb_compactionfilter_t::Filter` in its `c.cc`:
//! `new_value->assign(c_new_value, new_value_length)`). Without this, each changed row would have to leak its new value.

use rocksdb::CompactionDecision;

/// The value that a filter changes a row to, until it changes the next one.
#[derive(Debug, Default)]
pub struct ChangedValue {
    bytes: Vec<u8>,
}

impl ChangedValue {
    /// The decision to change the row to what `write` appends. To be returned to RocksDB as it is, by the filter that owns `self`.
    #[expect(unsafe_code, reason = "the binding's lifetime is longer than what RocksDB needs")]
    pub fn decision(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> CompactionDecision {
        self.bytes.clear();
        write(&mut self.bytes);
        // SAFETY: the slice is read once, by the copy that follows this call of the filter on the same thread. Until then `bytes` is
        // neither changed nor freed: the next call comes after it, and RocksDB destroys a filter when its compaction has ended. No
        // other thread has this filter: the factory makes one for each compaction, and for each part of one that runs on its own.
        let bytes: &'static [u8] = unsafe { std::slice::from_raw_parts(self.bytes.as_ptr(), self.bytes.len()) };
        CompactionDecision::Change(bytes)
    }
}
