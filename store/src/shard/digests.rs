//! Digests of a shard's living rows, by slot: what copies compare.

use super::Shard;
use crate::engine::EngineError;
use crate::engine::database::Still;
use std::ops::ControlFlow;
use vasto_proto::digest::Digests;
use vasto_proto::row::Header;

/// Bytes between two questions whether to go on: some milliseconds' work.
const STEP_BYTES: usize = 1 << 20;

impl Shard {
    /// Digests what was there then and is alive at `now_ms`. After each step `go_on` hears how many bytes it had; it may wait, and a
    /// `Break` ends the work with `None`.
    pub fn digests(
        &self,
        still: Still<'_>,
        now_ms: u64,
        mut go_on: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Digests>, EngineError> {
        let Still { mut walk, flush_ns, .. } = still;
        let mut digests = Digests::default();
        let mut step = 0;
        walk.seek(&[]);
        while let (Some(key), Some(row)) = (walk.key(), walk.value()) {
            let (header, _) = Header::decode(row).map_err(|error| EngineError::Corrupt(error.to_string()))?;
            if header.is_alive(now_ms) && header.stamp.ns > flush_ns {
                digests.add(key, row);
            }
            step += key.len() + row.len();
            walk.next();
            if step >= STEP_BYTES && go_on(std::mem::take(&mut step)).is_break() {
                return Ok(None);
            }
        }
        walk.status()?;
        Ok(Some(digests))
    }
}

#[cfg(test)]
mod tests {
    use super::super::executor::now_ns;
    use super::super::tests::{Client, open, shard};
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_compaction_leaves_of_dead_rows_makes_no_difference_and_a_living_row_does() {
        let folder = tempfile::tempdir().unwrap();
        let handle = open(folder.path(), |config| config.gc_grace = Duration::ZERO);
        let mut client = Client::new(&handle);
        for number in 0..2000u32 {
            client.call(&[b"SET", format!("key:{number}").as_bytes(), b"value"]);
            if number % 3 == 0 {
                client.call(&[b"DEL", format!("key:{number}").as_bytes()]);
            }
            if number % 7 == 0 {
                client.call(&[b"SET", format!("key:{number}").as_bytes(), b"value", b"PX", b"1"]);
            }
        }
        let shard = shard(&handle);
        let last_ms = now_ns() / 1_000_000;
        while now_ns() / 1_000_000 < last_ms + 2 {
            std::thread::yield_now();
        }
        let now_ms = now_ns() / 1_000_000;
        let digest =
            || shard.digests(shard.database.still().unwrap(), now_ms, |_| ControlFlow::Continue(())).unwrap().unwrap();
        let before = digest();
        let alive = (0..2000).filter(|number| number % 3 != 0 && number % 7 != 0).count();
        assert_eq!(before.rows(), alive as u64);
        shard.database.compact();
        assert!(shard.database.garbage().rows_expired() > 0 && shard.database.garbage().tombstones_dropped() > 0);
        assert_eq!(before.differing(&digest()), Vec::<u16>::new());
        client.call(&[b"SET", b"{slot}", b"1"]);
        let slot = vasto_proto::slot::slot_of(b"{slot}");
        assert_eq!(before.differing(&digest()), [slot]);
        client.call(&[b"FLUSHDB"]);
        assert_eq!(digest().rows(), 0);
    }

    #[test]
    fn a_digest_can_be_slowed_down_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let handle = open(folder.path(), |_| ());
        let mut client = Client::new(&handle);
        let value = vec![b'v'; STEP_BYTES / 2];
        for key in [b"a", b"b", b"c", b"d", b"e"] {
            client.call(&[b"SET", key, &value]);
        }
        let shard = shard(&handle);
        let mut steps = 0;
        let stopped = shard.digests(shard.database.still().unwrap(), 0, |bytes| {
            assert!(bytes >= STEP_BYTES);
            steps += 1;
            if steps == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((stopped.unwrap(), steps), (None, 2));
    }
}
