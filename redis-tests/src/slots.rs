//! Which shard a key belongs to, worked out apart from the servers: what a resize must move, and what it must leave alone.

/// As Redis Cluster has it.
const SLOTS: u16 = 16_384;

/// CRC16/XMODEM, bit by bit.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        let mixed = crc ^ (u16::from(*byte) << 8);
        (0..8).fold(mixed, |crc: u16, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 })
    })
}

/// What lies between the first `{` and the next `}`, else all of it.
fn hashed_part(key: &str) -> &str {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    tag.filter(|tag| !tag.is_empty()).unwrap_or(key)
}

pub fn slot_of(key: &str) -> u16 {
    crc16(hashed_part(key).as_bytes()) % SLOTS
}

/// SplitMix64 of the slot, then the jump hash of Lamping and Veach.
pub fn shard_of(key: &str, shards: usize) -> usize {
    let mut mixed = u64::from(slot_of(key)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let mut state = mixed ^ (mixed >> 31);
    let (mut shard, mut next) = (0, 0);
    while next < shards {
        shard = next;
        state = state.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        next = ((shard as f64 + 1.0) * ((1_u64 << 31) as f64 / ((state >> 33) as f64 + 1.0))) as usize;
    }
    shard
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(slot_of("foo"), 12_182);
        assert_eq!(slot_of("{foo}bar"), 12_182);
        assert_eq!(slot_of("{}foo"), crc16(b"{}foo") % SLOTS);
    }

    #[test]
    fn one_more_shard_takes_its_share_and_moves_nothing_else() {
        let keys: Vec<String> = (0..10_000).map(|number| format!("key:{number}")).collect();
        let moved: Vec<&String> = keys.iter().filter(|key| shard_of(key, 3) != shard_of(key, 4)).collect();
        assert!((2_200..2_800).contains(&moved.len()), "{}", moved.len());
        assert!(moved.iter().all(|key| shard_of(key, 4) == 3));
    }
}
