//! From a key to its slot and from a slot to its shard.
//!
//! The slot is Redis Cluster's (CRC16/XMODEM of the key or of its hash tag, modulo 16384,
//! <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/>). The shard is the jump consistent hash of
//! the slot (Lamping & Veach 2014, <https://arxiv.org/abs/1406.2294>), so that growing from n to n + 1 shards moves 1/(n + 1) of the slots and nothing else.

use crate::id::ShardId;

/// Number of hash slots; a slot is always below it.
pub const SLOT_COUNT: u16 = 16384;

/// Most shards of one keyspace.
pub const SHARD_COUNT_MAX: u16 = 1024;

const CRC16_TABLE: [u16; 256] = crc16_table();

const fn crc16_table() -> [u16; 256] {
    let mut table = [0u16; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { (crc << 1) ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// CRC16/XMODEM: polynomial 0x1021, initial value 0, no reflection.
pub fn crc16_xmodem(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0u16, |crc, byte| (crc << 8) ^ CRC16_TABLE[usize::from((crc >> 8) as u8 ^ byte)])
}

/// The part of the key that is hashed: what stands between the first `{` and the next `}` if that is not empty, else the key.
pub fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = memchr::memchr(b'{', key) else {
        return key;
    };
    let rest = &key[open + 1..];
    match memchr::memchr(b'}', rest) {
        Some(length) if length > 0 => &rest[..length],
        Some(_) | None => key,
    }
}

/// The slot of a key, below [`SLOT_COUNT`].
pub fn slot_of(key: &[u8]) -> u16 {
    crc16_xmodem(hash_tag(key)) % SLOT_COUNT
}

/// Spreads consecutive slots over the 64-bit space (Steele et al., SplitMix64).
pub fn splitmix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Jump consistent hash: a bucket below `bucket_count` (which must not be 0).
pub fn jump_consistent_hash(mut key: u64, bucket_count: u32) -> u32 {
    assert!(bucket_count > 0, "jump hash needs at least one bucket");
    let mut bucket: i64 = -1;
    let mut next: i64 = 0;
    while next < i64::from(bucket_count) {
        bucket = next;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        next = ((bucket + 1) as f64 * ((1u64 << 31) as f64 / ((key >> 33) + 1) as f64)) as i64;
    }
    bucket as u32
}

/// The shard of each slot for one shard count: a table, so that the hot path hashes nothing but the CRC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotTable {
    shard_count: u16,
    shards: Box<[u16]>,
}

impl SlotTable {
    /// `shard_count` between 1 and [`SHARD_COUNT_MAX`].
    pub fn new(shard_count: u16) -> Self {
        assert!((1..=SHARD_COUNT_MAX).contains(&shard_count), "shard count {shard_count} out of range");
        let shards = (0..SLOT_COUNT)
            .map(|slot| jump_consistent_hash(splitmix64(u64::from(slot)), u32::from(shard_count)) as u16)
            .collect();
        Self { shard_count, shards }
    }

    pub fn shard_count(&self) -> u16 {
        self.shard_count
    }

    /// The shard that owns a slot.
    pub fn shard(&self, slot: u16) -> ShardId {
        ShardId(self.shards[usize::from(slot)])
    }

    /// The slots of one shard in ascending order.
    pub fn slots(&self, shard: ShardId) -> impl Iterator<Item = u16> + '_ {
        (0..SLOT_COUNT).filter(move |slot| self.shards[usize::from(*slot)] == shard.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc16_matches_the_cluster_specification() {
        assert_eq!(crc16_xmodem(b"123456789"), 0x31c3);
        assert_eq!(crc16_xmodem(b""), 0);
    }

    /// Golden vectors: `redis-cli cluster keyslot KEY` of Redis 7 answers the same numbers.
    #[test]
    fn slots_match_redis() {
        for (key, slot) in [
            ("foo", 12182),
            ("bar", 5061),
            ("hello", 866),
            ("", 0),
            ("{user1000}.following", 3443),
            ("{user1000}.followers", 3443),
            ("foo{}{bar}", 8363),
            ("foo{{bar}}zap", 4015),
            ("foo{bar}{zap}", 5061),
        ] {
            assert_eq!(slot_of(key.as_bytes()), slot, "slot of {key:?}");
        }
    }

    #[test]
    fn hash_tags_follow_the_specification() {
        assert_eq!(hash_tag(b"{a}b"), b"a");
        assert_eq!(hash_tag(b"x{}y"), b"x{}y");
        assert_eq!(hash_tag(b"x{y"), b"x{y");
        assert_eq!(hash_tag(b"}x{y}"), b"y");
    }

    /// Golden vectors of the published algorithm.
    #[test]
    fn jump_hash_matches_the_paper() {
        for (key, buckets, bucket) in [
            (1u64, 1u32, 0u32),
            (42, 57, 43),
            (0xDEAD10CC, 1, 0),
            (0xDEAD10CC, 666, 361),
            (256, 1024, 520),
            (0, 128, 0),
        ] {
            assert_eq!(jump_consistent_hash(key, buckets), bucket, "jump({key}, {buckets})");
        }
    }

    #[test]
    fn splitmix_matches_the_reference() {
        // First outputs of the reference generator seeded with 0 and with 1234567.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(splitmix64(1_234_567), 6_457_827_717_110_365_317);
    }

    /// The table of three shards, as every gateway and store that ever ran has computed it.
    #[test]
    fn the_slot_table_never_changes() {
        let table = SlotTable::new(3);
        let first: Vec<u16> = (0..16).map(|slot| table.shard(slot).0).collect();
        let digest = (0..SLOT_COUNT)
            .fold(0u64, |digest, slot| splitmix64(digest ^ u64::from(table.shard(slot).0) ^ (u64::from(slot) << 16)));
        assert_eq!((first.as_slice(), digest), (GOLDEN_FIRST.as_slice(), GOLDEN_DIGEST));
    }
    const GOLDEN_FIRST: [u16; 16] = [2, 0, 0, 1, 2, 2, 0, 1, 0, 2, 2, 0, 1, 2, 1, 1];
    const GOLDEN_DIGEST: u64 = 16_511_185_623_093_183_398;

    #[test]
    fn growing_by_one_moves_only_to_the_new_shard() {
        for count in 1..64u16 {
            let (before, after) = (SlotTable::new(count), SlotTable::new(count + 1));
            let moved: Vec<u16> = (0..SLOT_COUNT).filter(|slot| before.shard(*slot) != after.shard(*slot)).collect();
            assert!(moved.iter().all(|slot| after.shard(*slot).0 == count), "slots move to the new shard only");
            let expected = f64::from(SLOT_COUNT) / f64::from(count + 1);
            assert!((moved.len() as f64 - expected).abs() < expected * 0.5 + 60.0, "{count}: moved {}", moved.len());
        }
    }
}
